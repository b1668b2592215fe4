"""Rotary position embedding (rope): the settings of config.json, and the factors that llama.cpp reads as tensors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.tensor_names import head_count
from lqexport.converters.models.text_parts import SECTIONS
from lqexport.errors import UserError

ROPE_FACTORS = "rope_freqs.weight"
"""The GGUF tensor that holds `llama3_factors` or `proportional_factors`."""
NOT_ROTATED = 1e30
"""The divisor of the rotary frequency of a pair of columns that is not rotated; llama.cpp's converter has the same."""
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
"""The GGUF tensors that hold longrope's `long_factor` and `short_factor`."""


def rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the rotary settings of config.json: `rope_theta`, `rope_type`, and the settings of that type.

    transformers 5 writes them as `rope_parameters`. Earlier versions write `rope_theta` and `rope_scaling`, with
    `rope_type` or `type` in it. Where blocks with a sliding window have other settings, these are the settings of the
    blocks that attend to the whole context.
    """
    scaling = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    scaling = dict(scaling.get("full_attention") or scaling)
    old_type = scaling.pop("type", "default")
    scaling.setdefault("rope_type", old_type)
    scaling.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    if config.get("partial_rotary_factor") is not None:
        scaling.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    if scaling["rope_type"] in ("su", "longrope"):
        scaling["rope_type"] = "longrope"
        original = scaling.get("original_max_position_embeddings")
        scaling["original_max_position_embeddings"] = config.get("original_max_position_embeddings") or original
    return scaling


def former_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Returns `rope_theta` and `rope_scaling`, as earlier versions of transformers write the rotary settings.

    `rope_scaling` is None where nothing is scaled; the type `dynamic` changes nothing within the usual context.
    """
    rope = rope_settings(config)
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    scaled = rope["rope_type"] not in ("default", "dynamic")
    return {"rope_theta": rope["rope_theta"], "rope_scaling": scaling if scaled else None}


def window_theta(config: dict[str, Any]) -> float | None:
    """Returns `rope_theta` of the blocks that attend to a sliding window; None where it is that of all blocks."""
    settings = config.get("rope_parameters") or {}
    theta = (settings.get("sliding_attention") or {}).get("rope_theta", config.get("rope_local_base_freq"))
    return None if theta is None else float(theta)


def head_dim(config: dict[str, Any]) -> int:
    """Returns the number of columns of a query head; the default is hidden_size / heads.

    Where heads have another size in blocks with a sliding window, it is the size in the blocks that attend to the whole
    context.
    """
    if "qk_nope_head_dim" in config:
        return int(config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    size = config.get("global_head_dim") or config.get("head_dim")
    return int(size or config["hidden_size"] // head_count(config))


def rotary_dim(config: dict[str, Any]) -> int:
    """Returns how many columns of a head are rotated; the type `proportional` rotates all, some of them by zero."""
    if "qk_nope_head_dim" in config:
        return int(config["qk_rope_head_dim"])
    if rope_settings(config)["rope_type"] == "proportional":
        return head_dim(config)
    return int(head_dim(config) * (rope_settings(config).get("partial_rotary_factor") or 1.0))


def rope_sections(architecture: Architecture, config: dict[str, Any]) -> list[int]:
    """Returns `mrope_section` of config.json: how many pairs of columns each of three positions rotates.

    Raises UserError if these are not three whole numbers whose sum is the number of rotated pairs.
    """
    sections = config.get(SECTIONS) or list(architecture.rope_sections)
    pairs, whole = rotary_dim(config) // 2, all(isinstance(size, int) and size >= 0 for size in sections)
    if not whole or len(sections) != 3 or sum(sections) != pairs:
        raise UserError(f"config.json: {SECTIONS} must be three whole numbers with the sum {pairs}, not {sections}.")
    return sections


def rope_factors(config: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    """Returns the tensors by which llama.cpp divides the rotary frequencies: GGUF name -> float32 [rotary_dim / 2].

    Returns {} for a rope type that needs none. Raises UserError if config.json lacks a setting of the type.
    """
    settings = rope_settings(config)
    if settings["rope_type"] == "llama3":
        return {ROPE_FACTORS: llama3_factors(config)}
    if settings["rope_type"] == "proportional":
        return {ROPE_FACTORS: proportional_factors(config)}
    if settings["rope_type"] == "longrope":
        keys = {LONG_FACTORS: "long_factor", SHORT_FACTORS: "short_factor"}
        return {name: _long_factors(settings, key, rotary_dim(config) // 2) for name, key in keys.items()}
    return {}


def _long_factors(settings: dict[str, Any], key: str, count: int) -> NDArray[np.float32]:
    factors = np.array(settings.get(key) or (), np.float32)
    if factors.shape != (count,):
        raise UserError(f"config.json: rope scaling of type longrope needs {count} numbers in {key}.")
    return factors


def longrope_attention(config: dict[str, Any]) -> float:
    """Returns the factor by which longrope multiplies rotated queries and keys.

    It is `attention_factor` where config.json gives it, else sqrt(1 + ln(factor) / ln(original context length)), as in
    `_compute_longrope_parameters` of transformers. Raises UserError if the original context length is missing.
    """
    settings = rope_settings(config)
    if settings.get("attention_factor"):
        return float(settings["attention_factor"])
    original = settings["original_max_position_embeddings"]
    if not original:
        raise UserError("config.json: rope scaling of type longrope needs original_max_position_embeddings.")
    factor = settings.get("factor") or config["max_position_embeddings"] / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def proportional_factors(config: dict[str, Any]) -> NDArray[np.float32]:
    """Returns the divisors of the rotary frequencies for rope_type `proportional`, float32 [rotary_dim / 2].

    The first `partial_rotary_factor` of the pairs of columns have the divisor `factor`. The others are not rotated:
    `NOT_ROTATED` makes their frequency zero (`_compute_proportional_rope_parameters` of transformers).
    """
    settings, pairs = rope_settings(config), rotary_dim(config) // 2
    rotated = int((settings.get("partial_rotary_factor") or 1.0) * rotary_dim(config) // 2)
    factors = np.full(pairs, NOT_ROTATED, np.float32)
    factors[:rotated] = settings.get("factor") or 1.0
    return factors


def llama3_factors(config: dict[str, Any]) -> NDArray[np.float32]:
    """Returns the divisors of the rotary frequencies for rope_type `llama3`, float32 [rotary_dim / 2].

    The divisor is 1 for wavelengths below original / high_freq_factor, and `factor` for wavelengths above
    original / low_freq_factor. In between it is 1 / ((1 - s) / factor + s), with s linear in the frequency, from 0 at
    the longest of these wavelengths to 1 at the shortest (Llama 3.1, `_compute_llama3_parameters` of transformers).
    Raises UserError if a setting is missing.
    """
    settings = rope_settings(config)
    try:
        factor, low, high = (float(settings[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        original = float(settings.get("original_max_position_embeddings") or config["max_position_embeddings"])
    except KeyError as error:
        raise UserError(f"config.json: rope scaling of type llama3 needs {error.args[0]}.") from None
    size = rotary_dim(config)
    frequencies = settings["rope_theta"] ** -(np.arange(0, size, 2, dtype=np.float64) / size)
    turns = original * frequencies / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
