"""Checks config.json before anything is computed from it: values of the right type, and sizes that a model can have."""

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
    "n_positions", "word_embed_proj_dim", "sliding_window_pattern", "moe_topk", "moe_num_experts", "moe_k",
    "moe_num_shared_experts", "n_routed_experts", "n_shared_experts", "shared_expert_intermediate_size", "rotary_dim",
)  # fmt: skip
"""Keys whose value, if given, is a whole number from 0 to 2^31 - 1: GGUF holds them in 32 bits."""
COUNTS_OF_BLOCKS = ("moe_intermediate_size", "moe_topk")
"""Keys whose value may also be a list of such numbers, one for each block."""
EQUAL_IN_BLOCKS = ("intermediate_size",)
"""Keys whose value may also be a list of such numbers, one for each block, that are equal."""
LAYERS = ("num_hidden_layers", "n_layer")
"""Keys that hold the number of decoder blocks."""
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Keys that hold the number of experts of a block."""
MOST_LAYERS = 1024
MOST_EXPERTS = 2**17
"""The most experts of all layers together.

The largest models have some 30000. Every expert costs time before any weight is read.
"""
SETTINGS = ("rope_parameters", "rope_scaling")
"""Keys whose value is an object of settings (see `_is_settings`)."""
NUMBERS = ("rope_theta", "rope_local_base_freq", "partial_rotary_factor", "rms_norm_eps", "layer_norm_eps",
           "layer_norm_epsilon", "norm_epsilon", "rotary_pct", "query_pre_attn_scalar")  # fmt: skip
"""Keys whose value is a finite number."""
ROPE_NUMBERS = ("factor", "rope_theta", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
                "attention_factor", "partial_rotary_factor")  # fmt: skip
"""Settings of rope whose value is a number above 0."""
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")
"""Settings that rope scaling of type llama3 needs. Without them transformers does not even load the tokenizer."""
TYPES: dict[str, type] = {"model_type": str, "text_config": dict, "quantization_config": dict}
"""Keys whose value must have this type; its content is not checked."""
LISTS = {"architectures": str, "layer_types": str, "mlp_layer_types": str, "no_rope_layers": int}
"""Keys whose value is a list, with the type of its items."""


def read_config(path: Path, missing: str) -> dict[str, Any]:
    """Returns the content of the config.json at `path`, checked by `check_config`.

    missing   the error message if there is no file

    Raises UserError as `read_json` and `check_config` do.
    """
    return check_config(read_json(path, missing), path)


def check_config(config: dict[str, Any], source: object) -> dict[str, Any]:
    """Returns `config` unchanged. Raises UserError if a value that we use cannot be that of a model.

    source   the file that it was read from, as the message names it
    """
    for name, value in config.items():
        if (requirement := _unmet_requirement(name, value)) is not None:
            raise UserError(f"{source}: {name} must be {requirement}, not {value!r}.")
        if name in SETTINGS and (fault := _rope_fault(value or {})):
            raise UserError(f"{source}: {name} {fault}.")
    layers = next((config[name] for name in LAYERS if config.get(name)), 1)
    experts = max(config.get(name) or 0 for name in EXPERTS)
    if layers * experts > MOST_EXPERTS:
        raise UserError(f"{source}: {layers} layers of {experts} experts each are more than any model has.")
    if config.get("text_config"):
        check_config(config["text_config"], source)
    return config


def _unmet_requirement(name: str, value: Any) -> str | None:
    """Returns what the value of the key `name` should be; None if it is that, is not given, or is not checked here."""
    if value is None:
        return None
    if name in COUNTS_OF_BLOCKS and isinstance(value, list):
        return None if all(_is_whole(item, 2**31 - 1) for item in value) else "a list of whole numbers"
    if name in EQUAL_IN_BLOCKS and isinstance(value, list):
        fits = len(set(map(str, value))) == 1 and _is_whole(value[0], 2**31 - 1)
        return None if fits else "a whole number, or a list of equal ones"
    if name in COUNTS:
        return None if _is_whole(value, 2**31 - 1) else "a whole number from 0 to 2147483647"
    if name in LAYERS:
        return None if _is_whole(value, MOST_LAYERS) else f"a whole number up to {MOST_LAYERS}"
    if name in NUMBERS:
        return None if _is_number(value) else "a finite number"
    if name in SETTINGS:
        return None if _is_settings(value) else "an object of finite numbers, lists of them and texts"
    if (value_type := TYPES.get(name)) is not None:
        return None if isinstance(value, value_type) else "a text" if value_type is str else "an object"
    if (item_type := LISTS.get(name)) is not None:
        fits = isinstance(value, list) and all(isinstance(item, item_type) for item in value)
        return None if fits else f"a list of {'texts' if item_type is str else 'whole numbers'}"
    return None


def _is_whole(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _is_number(value: Any) -> bool:
    # No setting is larger than 32 bits, and GGUF could not hold one.
    return isinstance(value, int | float) and math.isfinite(value) and abs(value) < 2**31


def _is_settings(value: Any) -> bool:
    """Returns whether a value is an object of texts, numbers, nulls, lists of numbers and further such objects."""
    return isinstance(value, dict) and all(map(_is_setting, value.values()))


def _rope_fault(settings: dict[str, Any]) -> str | None:
    """Returns what is wrong with settings of rope, or with those of one type of blocks, as the rest of a sentence."""
    for name, value in settings.items():
        if isinstance(value, dict) and (fault := _rope_fault(value)):
            return fault
        if name in ROPE_NUMBERS and value is not None and not (_is_number(value) and value > 0):
            return f"has {name} {value!r}, which must be a number above 0"
    missing = [name for name in LLAMA3 if settings.get(name) is None]
    if "llama3" in (settings.get("rope_type"), settings.get("type")) and missing:
        return f"is of the type llama3 and has no {missing[0]}"
    return None


def _is_setting(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_number, value))
    return value is None or isinstance(value, str) or _is_number(value) or _is_settings(value)
