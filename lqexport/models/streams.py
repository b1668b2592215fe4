"""Hidden states of models that have several of them for each token between blocks (Gemma 3n, DeepSeek V4).

Every block mixes them anew. They are columns beside each other, so that all that is kept of a token is one vector.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

Loaded = Callable[[str], nn.Module]
"""A function that returns a module of the model by its name, with its weights."""


class Streams(Protocol):
    """How several hidden states of a token are kept, and what becomes of them after the last block.

    count   how many there are
    """

    count: int

    def joined(self, streams: Tensor) -> Tensor:
        """Returns the states [batch, length, count * hidden] of what a block returns."""

    def apart(self, states: Tensor) -> Tensor:
        """Returns what a block takes, from the states [batch, length, count * hidden]."""

    def merged(self, states: Tensor, loaded: Loaded) -> Tensor:
        """Returns the hidden states [..., hidden] after the last block, from its states."""


class AltUp:
    """The hidden states of Gemma 3n, which blocks take and return as [count, batch, length, hidden].

    prefix   name of the list of linears by which all but the first are multiplied after the last block
    """

    def __init__(self, count: int, prefix: str) -> None:
        self.count = count
        self._names = [f"{prefix}.{number}" for number in range(count - 1)]

    def joined(self, streams: Tensor) -> Tensor:
        return streams.movedim(0, -2).flatten(-2)

    def apart(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.count, -1)).movedim(-2, 0)

    def merged(self, states: Tensor, loaded: Loaded) -> Tensor:
        """Returns the hidden states [..., hidden] after the last block, from its states.

        They are the mean of the first stream and of the products of the others, which get the first one's size (AltUp,
        Baykal et al. 2023, as transformers' Gemma 3n has it).
        """
        first, *others = self.apart(states)
        products = [loaded(name)(other) for name, other in zip(self._names, others, strict=True)]
        size = _size(first)
        scaled = [product * size / _size(product, 1e-5) for product in products]
        return torch.stack([first, *scaled]).mean(0)


class HyperConnections:
    """The hidden states of DeepSeek V4, which blocks take and return as [batch, length, count, hidden].

    head   name of the module that merges them after the last block
    """

    def __init__(self, count: int, head: str) -> None:
        self.count, self._head = count, head

    def joined(self, streams: Tensor) -> Tensor:
        return streams.flatten(-2)

    def apart(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.count, -1))

    def merged(self, states: Tensor, loaded: Loaded) -> Tensor:
        """Returns the hidden states [..., hidden] after the last block: a sum whose weights follow from all of them."""
        streams = self.apart(states)
        merged: Tensor = loaded(self._head)(streams.reshape(1, -1, *streams.shape[-2:]))
        return merged.reshape(*states.shape[:-1], -1)


def _size(states: Tensor, least: float = 0.0) -> Tensor:
    """Returns the root of the mean square of each vector, at least that of `least`."""
    return states.square().mean(-1, keepdim=True).clamp(min=least).sqrt()
