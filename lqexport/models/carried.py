"""Further states of some models' decoder blocks beside hidden states: inputs of their own, and keys of earlier blocks.

Both belong to tokens, as hidden states do. So they are further columns of these, and whoever keeps the states of a
sequence between blocks keeps all that the next blocks need. Gradients flow through the keys and values, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

INPUT, SHARED = "per_layer_input", "shared_kv_states"
"""The names of the arguments by which transformers' blocks get inputs of their own, and keys and values of others."""
Shared = dict[str, tuple[Tensor, Tensor]]
"""Type of blocks -> the keys and values [batch, heads, length, head_dim] that later blocks of this type use."""
Call = Callable[[Tensor, Tensor | None, Shared], Tensor]
"""A function that runs a block on hidden states, its own inputs (None if it has none) and the shared keys and values.

It returns hidden states. A block that computes keys and values for later blocks adds them to the shared ones."""


class Carried:
    """The columns of the states that a model passes from block to block.

    They are the hidden states, the shared keys and values that this or a later block uses, and the inputs of this block
    and of all later ones.

    hidden   the number of columns of the hidden states
    blocks   transformers' decoder blocks (Gemma 3n, Gemma 4)
    """

    def __init__(self, hidden: int, blocks: nn.ModuleList) -> None:
        attention: list[Any] = [block.self_attn for block in blocks]
        self._hidden = hidden
        self._inputs = [int(block.hidden_size_per_layer_input or 0) for block in blocks]  # type: ignore[arg-type]
        self._makers = {each.layer_type: i for i, each in enumerate(attention) if each.store_full_length_kv}
        self._last_users = {each.layer_type: i for i, each in enumerate(attention) if each.is_kv_shared_layer}
        makers = {name: attention[i] for name, i in self._makers.items()}
        self._sizes = {name: (each.k_proj.out_features, each.head_dim) for name, each in makers.items()}

    def _types(self, index: int) -> list[str]:
        """Returns the types of blocks whose shared keys and values enter block `index`."""
        return [name for name, maker in self._makers.items() if maker < index <= self._last_users.get(name, -1)]

    def joined(self, index: int, hidden: Tensor, shared: Shared, inputs: Tensor) -> Tensor:
        """Returns the states [batch, length, columns] that enter block `index`.

        inputs   the inputs of this block and of all later ones [batch, length, columns]
        """
        pairs = [each.transpose(1, 2).flatten(2) for name in self._types(index) for each in shared[name]]
        return torch.cat([hidden, *(pair.to(hidden.dtype) for pair in pairs), inputs], -1)

    def run(self, index: int, states: Tensor, call: Call) -> Tensor:
        """Returns the states that enter the block after block `index`; after the last block, the hidden states."""
        types = self._types(index)
        pairs = [self._sizes[name][0] for name in types for _ in range(2)]
        hidden, *parts = states.split([self._hidden, *pairs, sum(self._inputs[index:])], -1)
        inputs, by_head = parts.pop(), [self._by_head(types[i // 2], part) for i, part in enumerate(parts)]
        shared = dict(zip(types, zip(by_head[::2], by_head[1::2], strict=True), strict=True))
        own = inputs[..., : self._inputs[index]] if self._inputs[index] else None
        # A copy, since some blocks change hidden states in place.
        output = call(hidden.clone(), own, shared)
        return self.joined(index + 1, output, shared, inputs[..., self._inputs[index] :])

    def _by_head(self, name: str, columns: Tensor) -> Tensor:
        return columns.unflatten(-1, (-1, self._sizes[name][1])).transpose(1, 2)
