"""Rebuilds config.json of a model in a GGUF file from its metadata and tensors, by the table of architectures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lqexport.converters.gguf.metadata import TOKEN_TYPES, WINDOW_THETA
from lqexport.converters.gguf.support import query_scalar
from lqexport.converters.models.architecture import (
    FIRST,
    FURTHER_COUNT,
    KEY_HEADS,
    MEAN,
    WINDOW_PERIOD,
    Architecture,
    Config,
)
from lqexport.converters.models.further import block_count
from lqexport.converters.models.hf_defaults import FULL, SLIDING, default_of, default_rope
from lqexport.converters.models.rope import (
    LONG_FACTORS,
    NOT_ROTATED,
    ROPE_FACTORS,
    SHORT_FACTORS,
    head_dim,
    llama3_factors,
)
from lqexport.converters.models.text_parts import SECTIONS
from lqexport.converters.models.value_heads import TILED
from lqexport.converters.models.windows import layer_types
from lqexport.errors import UserError


class Metadata:
    """The metadata of a GGUF file, with error messages for missing or invalid values.

    source   the file's name, for the messages
    """

    def __init__(self, source: str, architecture: Architecture, values: dict[str, Any]) -> None:
        self.source, self.architecture, self.values = source, architecture, values

    def get(self, key: str) -> Any:
        """Returns the value of an architecture's key, such as `block_count` for `llama.block_count`, or None."""
        return self.values.get(f"{self.architecture.gguf}.{key}")

    def number(self, key: str, default: float | None = None) -> Any:
        """Returns a positive number by its key; of an array with one number for each block, the largest.

        llama.cpp's converter writes 0 where a model has nothing that has that number: the default is taken.

        Raises UserError if the file has none and there is no default.
        """
        value = self.values.get(f"{self.architecture.gguf}.{key}", default)
        if isinstance(value, list) and value and all(isinstance(each, int | float) for each in value):
            value = max(value)
        value = default if value == 0 else value
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"{self.source} gives no {self.architecture.gguf}.{key}.")
        return value


def config_of(metadata: Metadata, vocabulary: int, present: set[str], factors: Mapping[str, NDArray[Any]]) -> Config:
    """Returns the content of config.json. A float32 of the file becomes the shortest decimal that rounds to it.

    vocabulary   number of rows of the embedding
    present      Hugging Face names of the file's tensors
    factors      the tensors of rope factors, by their GGUF names

    Raises UserError if the metadata lacks a value, or has one that config.json cannot express.
    """
    architecture = metadata.architecture
    config = {key: allowed[0] for key, allowed in architecture.fixed.items() if _is_said(architecture, key, allowed[0])}
    config |= {key: values[0] for key, values in architecture.when.items() if _is_said(architecture, key, values[0])}
    config |= _sizes(metadata) | _keys(metadata, rope=False) | _special_tokens(metadata)
    config |= {
        "architectures": [architecture.classes[0]],
        "model_type": architecture.model_type,
        "vocab_size": vocabulary,
        "tie_word_embeddings": architecture.output not in present,
    }
    biased = {name.removesuffix(".bias") for name in present if name.endswith(".bias")}
    config |= {flag: any(name.endswith(module) for name in biased) for flag, module in architecture.flags.items()}
    config |= _windows(metadata, config)
    if TOKEN_TYPES in architecture.gguf_top.values():
        config["type_vocab_size"] = metadata.values.get("tokenizer.ggml.token_type_count")
    if architecture.encoder and config["pooling_type"] not in (MEAN, FIRST):
        raise UserError(f"{metadata.source} pools in another way than by the mean or the first token.")
    if architecture.latent:
        config |= _latent_head_sizes(metadata, config)
    if architecture.latent or not architecture.free_heads:
        del config["head_dim"]
    if architecture.rope_types:
        config |= _rope(metadata, config, factors)
    if architecture.rope_sections:
        config[SECTIONS] = _sections(metadata)
    if architecture.wide_scale is not None:
        config["query_pre_attn_scalar"] = query_scalar(architecture, config)
    config |= {key: list(values)[: architecture.first_further] for key, values in architecture.per_block.items()}
    config |= {key: config[other] for key, other in architecture.same.items() if other in config}
    config |= {TILED: True} if architecture.tiled else {}
    config |= architecture.restored(config)
    return config | {alias: config[name] for alias, name in architecture.aliases.items() if name in config}


def _is_said(architecture: Architecture, key: str, value: Any) -> bool:
    """Returns whether config.json must have a key: not where None is the default."""
    return value is not None or default_of(architecture, {}, key) is not None


def _sizes(metadata: Metadata) -> Config:
    architecture = metadata.architecture
    heads = metadata.number("attention.head_count", None if architecture.attends else 1)
    hidden, absorbed = metadata.number("embedding_length"), architecture.absorbed
    # llama.cpp's converter leaves the key out where all MLPs are experts (DeepSeek V4).
    other_width = metadata.get("expert_feed_forward_length") or (None if architecture.has_mlps else 1)
    length = "attention.key_length_mla" if absorbed else "attention.key_length"
    return {
        "hidden_size": hidden,
        "intermediate_size": metadata.number("feed_forward_length", other_width),
        **_blocks(metadata),
        "num_attention_heads": heads,
        "num_key_value_heads": heads if absorbed else metadata.number(KEY_HEADS, heads),
        "head_dim": metadata.number(length, metadata.number("rope.dimension_count", max(hidden // heads, 1))),
        "max_position_embeddings": metadata.number("context_length"),
    }


def _blocks(metadata: Metadata) -> Config:
    """Returns the number of decoder blocks, and of blocks that predict further tokens if there are any."""
    count, further = metadata.number("block_count"), metadata.architecture.first_further
    return {"num_hidden_layers": count} if further is None else {
        "num_hidden_layers": further, FURTHER_COUNT: count - further
    }  # fmt: skip


def _latent_head_sizes(metadata: Metadata, config: Config) -> Config:
    rotated = metadata.number("rope.dimension_count")
    if not rotated < config["head_dim"]:
        raise UserError(f"{metadata.source} is damaged: no part of a head is not rotated.")
    return {
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": config["head_dim"] - rotated,
        "v_head_dim": metadata.number(
            "attention.value_length_mla" if metadata.architecture.absorbed else "attention.value_length"
        ),
    }


def _keys(metadata: Metadata, *, rope: bool) -> Config:
    settings = {}
    for key in (key for key in metadata.architecture.keys if key.rope == rope):
        value = metadata.values.get(f"{metadata.architecture.gguf}.{key.name}", key.default)
        values = value if key.many and isinstance(value, list) else [value]
        if any(not isinstance(each, int | float) or not math.isfinite(each) for each in values):
            raise UserError(f"{metadata.source} gives no {metadata.architecture.gguf}.{key.name}.")
        typed = [_decimal(each) if key.value_type is float else key.value_type(each) for each in values]
        last = metadata.architecture.first_further if key.further else None
        settings[key.config] = typed[:last] if key.many else typed[0]
    return settings


def _special_tokens(metadata: Metadata) -> Config:
    ids = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    numbers = {key: metadata.values.get(f"tokenizer.ggml.{gguf}_token_id") for key, gguf in ids.items()}
    ends = (numbers["eos"], *(metadata.values.get(f"tokenizer.ggml.{role}_token_id") for role in ("eot", "eom")))
    different = list(dict.fromkeys(number for number in ends if isinstance(number, int)))
    return {f"{key}_token_id": number for key, number in numbers.items()} | (
        {"eos_token_id": different} if len(different) > 1 else {}
    )


def _windows(metadata: Metadata, config: Config) -> Config:
    if metadata.architecture.any_windows:
        return _any_windows(metadata, config)
    period = metadata.architecture.period
    if period is None:
        return {}
    layers, given = config["num_hidden_layers"], metadata.get(WINDOW_PERIOD)
    if layers > 1 << 16:
        raise UserError(f"{metadata.source} is damaged: it says that it has {layers} blocks.")
    period = given if isinstance(given, int) and given > 0 else period
    width = metadata.get("attention.sliding_window")
    return {
        "layer_types": layer_types(period, layers),
        "sliding_window": None if width == 0 else int(metadata.number("attention.sliding_window", 4096)),
    }


def _any_windows(metadata: Metadata, config: Config) -> Config:
    given = metadata.get(WINDOW_PERIOD)
    if not isinstance(given, list) or len(given) != block_count(config):
        raise UserError(f"{metadata.source} does not say for each block whether it has a sliding window.")
    types = [SLIDING if has_window else FULL for has_window in given[: config["num_hidden_layers"]]]
    return {"layer_types": types, "sliding_window": int(metadata.number("attention.sliding_window"))}


def _rope(metadata: Metadata, config: Config, factors: Mapping[str, NDArray[Any]]) -> Config:
    rope = {"rope_type": "default", "rope_theta": _decimal(metadata.number("rope.freq_base", 10000.0))}
    if (columns := head_dim(config)) < 1:
        raise UserError(f"{metadata.source} is damaged: its hidden size is smaller than the number of its heads.")
    rotated = metadata.number("rope.dimension_count", columns)
    if (rotated != columns or metadata.architecture.partial) and not metadata.architecture.latent:
        rope["partial_rotary_factor"] = rotated / columns
    rope |= _scaling(metadata, factors) | _keys(metadata, rope=True)
    if ROPE_FACTORS in factors and "proportional" in metadata.architecture.rope_types:
        rope |= _proportional(factors[ROPE_FACTORS])
    elif ROPE_FACTORS in factors:
        rope |= _llama3(metadata, config, rope, factors[ROPE_FACTORS])
    if SLIDING in default_rope(metadata.architecture):
        # llama.cpp's converter leaves the key out for Gemma 3, and llama.cpp takes 10000 then.
        local = {"rope_type": "default", "rope_theta": _decimal(metadata.number(WINDOW_THETA, 10000.0))}
        if metadata.architecture.one_theta:
            local["rope_theta"] = rope["rope_theta"]
        return {"rope_parameters": {FULL: rope, SLIDING: local}}
    original = rope.get("original_max_position_embeddings") if rope["rope_type"] == "longrope" else None
    return {"rope_parameters": rope} | ({"original_max_position_embeddings": original} if original else {})


def _sections(metadata: Metadata) -> list[int]:
    sections = metadata.get("rope.dimension_sections")
    if not isinstance(sections, list) or not all(isinstance(size, int) for size in sections):
        raise UserError(f"{metadata.source} gives no {metadata.architecture.gguf}.rope.dimension_sections.")
    return sections[:3]


def _scaling(metadata: Metadata, factors: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    rope_type = metadata.get("rope.scaling.type") or "none"
    if rope_type == "none":
        return {}
    if rope_type not in ("linear", "yarn", "longrope"):
        raise UserError(f"{metadata.source} has rope scaling of type {rope_type!r}, which is not supported.")
    settings: dict[str, Any] = {"rope_type": rope_type}
    if rope_type != "linear":
        settings["original_max_position_embeddings"] = metadata.number("rope.scaling.original_context_length")
    if rope_type == "yarn" and metadata.architecture.unrounded_yarn:
        settings["truncate"] = False
    if rope_type != "longrope":
        return settings | {"factor": _decimal(metadata.number("rope.scaling.factor"))} | _mscale(metadata)
    if missing := {LONG_FACTORS, SHORT_FACTORS} - factors.keys():
        raise UserError(f"{metadata.source} has no tensor {', '.join(sorted(missing))}.")
    tensors = {"long_factor": LONG_FACTORS, "short_factor": SHORT_FACTORS}
    lists = {key: [_decimal(value) for value in factors[name]] for key, name in tensors.items()}
    return settings | lists | {"attention_factor": _decimal(metadata.number("rope.scaling.attn_factor", 1.0))}


def _mscale(metadata: Metadata) -> dict[str, Any]:
    multiplier, usual = metadata.get("rope.scaling.yarn_log_multiplier"), metadata.architecture.mscale
    if multiplier is None or usual is None:
        return {}
    mscale = _decimal(multiplier / usual)
    return {"mscale": mscale, "mscale_all_dim": mscale}


def _proportional(factors: NDArray[Any]) -> dict[str, Any]:
    rotated = factors[factors < NOT_ROTATED / 2]
    factor = {"factor": _decimal(rotated[0])} if len(rotated) and rotated[0] != 1 else {}
    return {"rope_type": "proportional", "partial_rotary_factor": len(rotated) / len(factors)} | factor


def _llama3(metadata: Metadata, config: Config, rope: dict[str, Any], factors: NDArray[Any]) -> dict[str, Any]:
    """Returns the settings of rope_type `llama3` that give the file's factors; the file stores only the factors.

    The factors depend only on the ratios of the original context length to high_freq_factor and low_freq_factor. So
    these two are taken from Llama 3 (4 and 1). The original context length is 8192, as in Llama 3, or else the power
    of two that gives the factors. Raises UserError if none does.
    """
    settings = {"rope_type": "llama3", "factor": _decimal(factors.max()), "low_freq_factor": 1.0}
    for original in (8192, *(2**power for power in range(4, 21))):
        settings |= {"high_freq_factor": 4.0, "original_max_position_embeddings": original}
        expected = llama3_factors(config | {"rope_parameters": rope | settings})
        if factors.shape == expected.shape and np.allclose(factors, expected, rtol=1e-4):
            return settings
    raise UserError(f"{metadata.source}: {ROPE_FACTORS} is not what Llama 3 uses, so it cannot go into config.json.")


def _decimal(value: float) -> float:
    """Returns the shortest decimal that rounds to the same float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))
