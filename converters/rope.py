"""Rotary position embedding: the row order of llama.cpp, and the settings of config.json."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lqexport.converters.architectures import Architecture
from lqexport.converters.tensor_names import block_module, head_count
from lqexport.errors import UserError

ROPE_FACTORS = "rope_freqs.weight"
"""The GGUF tensor that holds `llama3_factors`."""


def rope_heads(architecture: Architecture, config: dict[str, Any], name: str) -> int | None:
    """By how many heads llama.cpp interleaves the rows of a tensor (weight or bias); None where it does not."""
    module = block_module(architecture, name)
    key = architecture.rope_permuted.get(module[1]) if module else None
    return None if key is None else head_count(config, key)


def rope_order(rows: int, heads: int) -> NDArray[np.int64]:
    """The row of Hugging Face that each row of GGUF holds: `gguf = hugging_face[order]`.

    Hugging Face rotates the first half of a head against the second, llama.cpp neighbours, so a head of rows
    0 1 2 3 is stored as 0 2 1 3. Moving rows moves whole blocks, so nothing is lost. Raises UserError where the rows
    are not pairs in every head.
    """
    if rows % (2 * heads):
        raise UserError(f"{rows} rows are not {heads} heads of an even size; config.json does not fit the weights.")
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta`, `rope_type` and what the type needs, from either spelling of config.json.

    transformers 5 writes `rope_parameters`, earlier versions `rope_theta` and `rope_scaling`, with `rope_type` or
    `type` in it.
    """
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    old_type = scaling.pop("type", "default")
    scaling.setdefault("rope_type", old_type)
    scaling.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return scaling


def head_dim(config: dict[str, Any]) -> int:
    """Columns of a head; config.json need not say it."""
    return int(config.get("head_dim") or config["hidden_size"] // head_count(config))


def llama3_factors(config: dict[str, Any]) -> NDArray[np.float32]:
    """What llama.cpp divides each rotary frequency by, float32 [head_dim / 2], for rope_type `llama3`.

    1 for wavelengths below original / high_freq_factor, `factor` above original / low_freq_factor, and in between
    1 / ((1 - s) / factor + s) with s falling linearly in the frequency (Llama 3.1, `_compute_llama3_parameters` of
    transformers). Raises UserError where a setting is missing.
    """
    settings = rope_settings(config)
    try:
        factor, low, high = (float(settings[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        original = float(settings["original_max_position_embeddings"])
    except KeyError as error:
        raise UserError(f"config.json: rope scaling of type llama3 needs {error.args[0]}.") from None
    size = head_dim(config)
    frequencies = settings["rope_theta"] ** -(np.arange(0, size, 2, dtype=np.float64) / size)
    turns = original * frequencies / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
