"""What config.json must be before anything is computed from it: right types, and sizes that a model can have."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lqexport.errors import UserError
from lqexport.storage.files import read_json

COUNTS = (
    "hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads", "num_key_value_heads",
    "num_kv_heads", "head_dim", "vocab_size", "max_position_embeddings", "sliding_window", "num_local_experts",
    "num_experts", "num_experts_per_tok", "original_max_position_embeddings", "ffn_dim", "n_embd", "n_head", "n_inner",
    "n_positions", "word_embed_proj_dim", "sliding_window_pattern",
)  # fmt: skip
"""Whole numbers above 0 where they are given; GGUF holds them in 32 bits."""
LAYERS = ("num_hidden_layers", "n_layer")
MOST_LAYERS = 1024
MOST_EXPERTS = 2**17
"""Of all layers together. The largest models have some 30000; every one costs time before any weight is read."""
SETTINGS = ("rope_parameters", "rope_scaling")
NUMBERS = ("rope_theta", "rope_local_base_freq", "partial_rotary_factor", "rms_norm_eps", "layer_norm_eps",
           "layer_norm_epsilon", "norm_epsilon", "rotary_pct", "query_pre_attn_scalar")  # fmt: skip
PLAIN: dict[str, type] = {"model_type": str, "text_config": dict, "quantization_config": dict}
LISTS = {"architectures": str, "layer_types": str, "no_rope_layers": int}


def read_config(path: Path, missing: str) -> dict[str, Any]:
    """A config.json. Raises UserError as `read_json`, and where it cannot be that of a model."""
    return check_config(read_json(path, missing), path)


def check_config(config: dict[str, Any], source: object) -> dict[str, Any]:
    """`config`, which was read from `source`. Raises UserError where a value that we use cannot be that of a model."""
    for name, value in config.items():
        if (wanted := _wanted(name, value)) is not None:
            raise UserError(f"{source}: {name} must be {wanted}, not {value!r}.")
    layers = next((config[name] for name in LAYERS if config.get(name)), 1)
    experts = max(config.get(name) or 0 for name in ("num_local_experts", "num_experts"))
    if layers * experts > MOST_EXPERTS:
        raise UserError(f"{source}: {layers} layers of {experts} experts each are more than any model has.")
    if config.get("text_config"):
        check_config(config["text_config"], source)
    return config


def _wanted(name: str, value: Any) -> str | None:
    """What the value of a key should be, None where it is that, is not given or is not ours to check."""
    if value is None:
        return None
    if name in COUNTS:
        return None if _is_whole(value, 2**31 - 1) else "a whole number from 0 to 2147483647"
    if name in LAYERS:
        return None if _is_whole(value, MOST_LAYERS) else f"a whole number up to {MOST_LAYERS}"
    if name in NUMBERS:
        return None if _is_number(value) else "a finite number"
    if name in SETTINGS:
        return None if _is_settings(value) else "an object of finite numbers, lists of them and texts"
    if (plain := PLAIN.get(name)) is not None:
        return None if isinstance(value, plain) else "a text" if plain is str else "an object"
    if (kind := LISTS.get(name)) is not None:
        fits = isinstance(value, list) and all(isinstance(item, kind) for item in value)
        return None if fits else f"a list of {'texts' if kind is str else 'whole numbers'}"
    return None


def _is_whole(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _is_number(value: Any) -> bool:
    # Beyond 32 bits there is no setting, and GGUF would not hold it.
    return isinstance(value, int | float) and math.isfinite(value) and abs(value) < 2**31


def _is_settings(value: Any) -> bool:
    """Whether a value is an object of texts, numbers, lists of numbers and such objects."""
    return isinstance(value, dict) and all(map(_is_setting, value.values()))


def _is_setting(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_number, value))
    return value is None or isinstance(value, str) or _is_number(value) or _is_settings(value)
