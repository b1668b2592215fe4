"""Writes the metadata of a GGUF file: what llama.cpp needs from config.json, and how the file was made."""

from __future__ import annotations

import json
import re
from typing import Any

from gguf import GGUFWriter, RopeScalingType

from lqexport.converters.gguf.mixes import file_type
from lqexport.converters.gguf.support import check_supported
from lqexport.converters.models.architecture import KEY_HEADS, WINDOW_PERIOD, Architecture, Config, Key
from lqexport.converters.models.hf_defaults import SLIDING
from lqexport.converters.models.rope import (
    head_dim,
    longrope_attention,
    rope_factors,
    rope_sections,
    rope_settings,
    rotary_dim,
    window_theta,
)
from lqexport.converters.models.tensor_names import head_count
from lqexport.converters.models.windows import window, window_period
from lqexport.errors import UserError
from lqexport.storage.published import public_run
from lqexport.target import Target

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
_TYPE = re.compile(r"(?i)[-._ ](?:(?:UD-)?I?Q\d\w*|TQ\d\w*|MXFP4\w*|NVFP4|BF16|FP?16|FP?32)$")
"""The end of a name that says how a file was quantized: `-Q4_K_M`."""
TOKEN_TYPES = "token_types.weight"
"""The GGUF tensor with an embedding for each type of token, which BERT has."""
VALUE_LENGTH = "attention.value_length"
WINDOW_THETA = "rope.freq_base_swa"


def check_metadata(architecture: Architecture, config: Config) -> None:
    """Raises UserError where a GGUF file of the model cannot be written for its config.json, before any work."""
    check_supported(architecture, config)
    add_model(GGUFWriter(None, str(architecture.gguf)), architecture, config, 1)
    rope_factors(config)


def add_model(
    writer: GGUFWriter, architecture: Architecture, config: Config, vocabulary: int, further: int = 0
) -> None:
    """Adds the sizes, attention settings and rotary embedding of a model to `writer`.

    vocabulary   number of rows of the embedding
    further      number of blocks that predict further tokens

    Raises UserError if config.json lacks a size, or asks for what llama.cpp does not compute for this architecture.
    """
    check_supported(architecture, config)
    writer.add_block_count(_size(config, "num_hidden_layers") + further)
    if further:
        writer.add_nextn_predict_layers(further)
    writer.add_context_length(context_length(architecture, config))
    writer.add_embedding_length(_size(config, "hidden_size"))
    given = {key.name for key in architecture.keys}
    if "feed_forward_length" not in given:
        writer.add_feed_forward_length(_size(config, "intermediate_size"))
    writer.add_head_count(head_count(config))
    if architecture.absorbed:
        _add_absorbed(writer, config)
        if KEY_HEADS not in given:
            writer.add_head_count_kv(1)
    else:
        if KEY_HEADS not in given:
            writer.add_head_count_kv(head_count(config, "num_key_value_heads"))
        writer.add_key_length(head_dim(config))
        if VALUE_LENGTH not in given:
            writer.add_value_length(config.get("v_head_dim") or head_dim(config))
    writer.add_vocab_size(vocabulary)
    if TOKEN_TYPES in architecture.gguf_top.values():
        writer.add_token_type_count(_size(config, "type_vocab_size"))
    for key in architecture.keys:
        _add_key(writer, key, config, further)
    _add_window(writer, architecture, config, further)
    if architecture.rope_types:
        _add_rope(writer, architecture, config)
    if architecture.rope_sections:
        writer.add_rope_dimension_sections([*rope_sections(architecture, config), 0])


def _add_absorbed(writer: GGUFWriter, config: Config) -> None:
    """Adds the sizes of the one head that attends to latent vectors, and of the heads that it stands for."""
    rank = _size(config, "kv_lora_rank")
    writer.add_key_length(rank + rotary_dim(config))
    writer.add_value_length(rank)
    writer.add_key_length_mla(head_dim(config))
    writer.add_value_length_mla(_size(config, "v_head_dim"))


def _size(config: Config, key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise UserError(f"config.json gives no {key}.")
    return value


def context_length(architecture: Architecture, config: Config) -> int:
    """Returns the longest context in which llama.cpp computes what config.json asks for.

    Where llama.cpp ignores sliding windows, that is at most one window.
    """
    longest = _size(config, "max_position_embeddings")
    has_windows = architecture.period is not None or architecture.any_windows or architecture.all_windows
    narrow = None if has_windows else window(config)
    return min(longest, narrow or longest)


def _add_key(writer: GGUFWriter, key: Key, config: Config, further: int) -> None:
    value = (rope_settings(config) if key.rope else config).get(key.config)
    value = key.default if value is None else value
    if key.many:
        values = [*value, *([config[key.further]] * further if key.further else [])]
        writer.add_array(f"{writer.arch}.{key.name}", [key.value_type(each) for each in values])
        return
    add = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}[key.value_type]
    add(f"{writer.arch}.{key.name}", key.value_type(value))


def _add_window(writer: GGUFWriter, architecture: Architecture, config: Config, further: int) -> None:
    period = window_period("llama.cpp", architecture, config)
    if period is None and not architecture.any_windows:
        return
    if period is not None:
        writer.add_uint32(f"{writer.arch}.{WINDOW_PERIOD}", period)
    else:
        of_further = [SLIDING in architecture.predicts_like] * further
        writer.add_sliding_window_pattern([name == SLIDING for name in config["layer_types"]] + of_further)
    writer.add_sliding_window(window(config) or 0)
    if (theta := window_theta(config)) is not None and not architecture.one_theta:
        writer.add_float32(f"{writer.arch}.{WINDOW_THETA}", theta)


def _add_rope(writer: GGUFWriter, architecture: Architecture, config: Config) -> None:
    settings = rope_settings(config)
    rope_type = settings["rope_type"]
    writer.add_rope_dimension_count(rotary_dim(config))
    writer.add_rope_freq_base(float(settings["rope_theta"]))
    # `dynamic` needs no key: it changes nothing within max_position_embeddings, which is the context length above.
    # `llama3` needs none either: it is the tensor rope_freqs.weight.
    if rope_type in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope_type))
        writer.add_rope_scaling_factor(float(settings["factor"]))
    if rope_type in ("yarn", "longrope"):
        original = settings.get("original_max_position_embeddings") or config["max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(int(original))
    if rope_type == "yarn" and architecture.mscale and settings.get("mscale_all_dim"):
        # Without latent attention any number has the effect of 1, since `mscale` is the same (check_supported).
        mscale = settings["mscale_all_dim"] if architecture.latent else 1
        writer.add_rope_scaling_yarn_log_mul(architecture.mscale * mscale)
    if rope_type == "longrope":
        writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
        writer.add_rope_scaling_attn_factors(longrope_attention(config))


def model_name(run: dict[str, Any]) -> str:
    """Returns the last part of the source's name, by the artifact's run.json; "" if that has none.

    The name of a .gguf file is without its type.
    """
    source = str((run.get("recipe") or {}).get("source", ""))
    name = source.rstrip("/").rpartition("/")[2]
    return without_type(name.removesuffix(".gguf")) if name.endswith(".gguf") else name


def without_type(name: str) -> str:
    """Returns a file's name without the type at its end: `llama` for `llama-Q4_K_M`."""
    return _TYPE.sub("", name)


def add_provenance(writer: GGUFWriter, run: dict[str, Any], main_type: str, name: str) -> None:
    """Adds the general keys to `writer`, and keys `lqexport.*` that say how the file was made.

    run         content of the artifact's run.json
    name        the model's name; "" for none
    main_type   the type that holds most of the weights; `general.file_type` names it if types were chosen by size
    """
    run = public_run(run)
    recipe = run.get("recipe") or {}
    writer.add_type("model")
    if name:
        writer.add_name(name)
    target = Target.parse(str(recipe.get("target", "")))
    if target.family == "gguf":
        writer.add_file_type(file_type(main_type if target.is_auto else target.type))
    writer.add_quantization_version(QUANTIZATION_VERSION)
    for key in ("recipe", "calibration", "versions"):
        if run.get(key):
            writer.add_string(f"lqexport.{key}", json.dumps(run[key], sort_keys=True))
