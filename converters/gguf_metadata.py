"""Metadata of a GGUF file: what llama.cpp needs to know of the model, from config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, RopeScalingType

from lqexport.converters.gguf_types import file_type
from lqexport.converters.rope import head_dim, rope_settings
from lqexport.converters.tensor_names import head_count
from lqexport.errors import UserError

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the model folder, {} where the file is missing. Raises UserError where it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it should hold a JSON object.")
    return content


def add_model(writer: GGUFWriter, config: dict[str, Any], vocabulary: int) -> None:
    """Sizes, attention and rotary embedding of architecture `llama` (Llama 1 to 3, Mistral, SmolLM2).

    vocabulary   rows of the embedding

    Raises UserError where config.json lacks a size or asks for what llama.cpp does not compute for this architecture.
    """
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UserError(f"llama.cpp has only the activation silu for this architecture, not {activation}.")
    writer.add_block_count(_size(config, "num_hidden_layers"))
    writer.add_context_length(_size(config, "max_position_embeddings"))
    writer.add_embedding_length(_size(config, "hidden_size"))
    writer.add_feed_forward_length(_size(config, "intermediate_size"))
    writer.add_head_count(head_count(config))
    writer.add_head_count_kv(head_count(config, "num_key_value_heads"))
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
    writer.add_vocab_size(vocabulary)
    _add_rope(writer, config)


def _size(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise UserError(f"config.json gives no {key}.")
    return value


def _add_rope(writer: GGUFWriter, config: dict[str, Any]) -> None:
    settings = rope_settings(config)
    kind = settings["rope_type"]
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(float(settings["rope_theta"]))
    # `dynamic` changes nothing within max_position_embeddings, which is the context length written above; `llama3`
    # is the tensor rope_freqs.weight and no key.
    if kind not in ("default", "dynamic", "linear", "yarn", "llama3"):
        raise UserError(f"llama.cpp has no rope scaling of type {kind!r} for this architecture.")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(settings["factor"]))
    if kind == "yarn":
        _add_yarn(writer, config, settings)


def _add_yarn(writer: GGUFWriter, config: dict[str, Any], settings: dict[str, Any]) -> None:
    original = settings.get("original_max_position_embeddings") or config["max_position_embeddings"]
    writer.add_rope_scaling_orig_ctx_len(int(original))
    # There are keys for some of the others, but llama.cpp does not read them for this architecture.
    fixed = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
    variable = ("rope_type", "rope_theta", "factor", "original_max_position_embeddings")
    others = {key: value for key, value in settings.items() if key not in variable and value is not None}
    if strange := [key for key, value in others.items() if value != fixed.get(key)]:
        raise UserError(f"llama.cpp computes yarn for this architecture without {', '.join(strange)} of config.json.")


def add_provenance(writer: GGUFWriter, run: dict[str, Any], most_weights: str) -> None:
    """General keys, and how the file was made: `lqexport.*`, from an artifact's run.json. `most_weights` is
    the type that holds most of them, by which a file of freely chosen types is named."""
    recipe = run.get("recipe") or {}
    writer.add_type("model")
    if name := str(recipe.get("source", "")).rstrip("/").rpartition("/")[2].removesuffix(".gguf"):
        writer.add_name(name)
    family, _, kind = str(recipe.get("target", "")).partition(":")
    if family == "gguf":
        writer.add_file_type(file_type(most_weights if kind == "auto" else kind))
    writer.add_quantization_version(QUANTIZATION_VERSION)
    for key in ("recipe", "calibration", "versions"):
        if run.get(key):
            writer.add_string(f"lqexport.{key}", json.dumps(run[key], sort_keys=True))
