"""Finds out which type each block of a GGUF file has, by the tensors that the file holds of it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from lqexport.converters.models.architecture import Architecture

SHARED_KEYS, FURTHER_KEY = "attention.shared_kv_layers", "nextn_predict_layers"
_OF_BLOCK = re.compile(r"blk\.(\d{1,6})\.(.+?)(?:\.weight|\.bias)?$")
"""The name of a tensor of a block: the block's number and the GGUF name of the module."""


def values_per_block(entry: Architecture, tensors: Collection[str]) -> dict[str, tuple[Any, ...]]:
    """Returns the keys of `only` of an entry with the values by which each block has the modules that a file holds.

    tensors   the GGUF names of the file's tensors
    """
    present: defaultdict[int, set[str]] = defaultdict(set)
    for name in tensors:
        if match := _OF_BLOCK.match(name):
            present[int(match[1])].add(match[2])
    layers = 1 + max(present, default=-1)
    return {
        key: tuple(_value_of(entry, key, present[layer]) for layer in range(min(layers, len(tensors))))
        for key in {key for key, _ in entry.only.values()}
    }


def first_borrower(entry: Architecture, metadata: Mapping[str, Any]) -> int | None:
    """Returns the number of the first block that uses the keys and values of an earlier one; None if there is none."""
    blocks, count = (metadata.get(f"{entry.gguf}.{key}") for key in ("block_count", SHARED_KEYS))
    if not entry.borrows or not isinstance(blocks, int) or not isinstance(count, int) or not 0 < count < blocks:
        return None
    return blocks - count


def first_further(entry: Architecture, metadata: Mapping[str, Any]) -> int | None:
    """Returns the number of the first block that predicts further tokens; None if there is none."""
    blocks, count = (metadata.get(f"{entry.gguf}.{key}") for key in ("block_count", FURTHER_KEY))
    if not entry.predictor or not isinstance(blocks, int) or not isinstance(count, int) or not 0 < count < blocks:
        return None
    return blocks - count


def _value_of(entry: Architecture, key: str, present: set[str]) -> Any:
    """Returns the first value of a key of `only` by which a block has modules that the file holds of it.

    present   the GGUF names of the block's tensors, without the block's prefix, and without `.weight` or `.bias`
    """
    for name, gguf in (entry.gguf_block | entry.gguf_tensors).items():
        condition = entry.condition(name)
        if condition and condition[0] == key and gguf.removesuffix(".weight").removesuffix(".bias") in present:
            return condition[1][0]
    return None
