"""Groups the tensors of a verified file by their role: their name without the number of the decoder block."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from lqexport.verification.result import TensorCheck

BLOCK = re.compile(r"\.(\d+)\.")
"""Matches the index of the decoder block in a tensor's name."""


def role_of(name: str) -> str:
    """Returns a tensor's role: its name without the block, so `mlp.up_proj` for `model.layers.3.mlp.up_proj.weight`."""
    inside = name[match.end() :] if (match := BLOCK.search(name)) else name.removeprefix("model.")
    return inside.removesuffix(".weight")


def block_of(name: str) -> int | None:
    """Returns the index of the decoder block that a tensor is in; None outside the blocks."""
    return int(match[1]) if (match := BLOCK.search(name)) else None


@dataclass(frozen=True)
class Role:
    """All tensors of one role: their number, their types, and the sums of their weights and bytes."""

    name: str
    count: int
    types: tuple[str, ...]
    weights: int
    nbytes: int


def roles(tensors: Iterable[TensorCheck]) -> list[Role]:
    """Groups tensors by role, the largest role first. Vectors (norms, biases) are one role."""
    groups: dict[str, list[TensorCheck]] = {}
    for tensor in tensors:
        groups.setdefault("norms and biases" if len(tensor.shape) == 1 else role_of(tensor.name), []).append(tensor)
    grouped = [
        Role(
            name,
            len(group),
            tuple(dict.fromkeys(tensor.codec for tensor in group)),
            sum(tensor.weights for tensor in group),
            sum(tensor.nbytes for tensor in group),
        )
        for name, group in groups.items()
    ]
    return sorted(grouped, key=lambda role: -role.nbytes)
