"""The states that decoder blocks pass on: hidden states, and in some models inputs of blocks, keys, a choice of
tokens, or the numbers of the tokens.

All of it belongs to tokens, as hidden states do. So the rest are further columns of these, and whoever keeps the states
of a sequence between blocks keeps all that the next blocks need. Gradients flow through keys and values, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lqexport.converters.models.architecture import TOKEN_DIGITS, Architecture

INPUT, SHARED, IDS = "per_layer_input", "shared_kv_states", "input_ids"
"""The names of the arguments by which transformers' blocks get inputs of their own, keys and values of others, and the
numbers of the tokens."""
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a block beside hidden states: those by position, and those by name."""
Call = Callable[..., Any]
"""A function that runs a block on hidden states and `Arguments`, and returns what the block returns."""
Shared = dict[str, tuple[Tensor, Tensor]]
"""Type of blocks -> the keys and values [batch, heads, length, head_dim] that later blocks of this type use."""


class States(Protocol):
    """How the states that a model passes from block to block are kept as one tensor [batch, length, columns]."""

    def passed(self, hidden: Any) -> Any:
        """Returns what a block returns that changes nothing, for what transformers gives it as hidden states."""

    def start(self, hidden: Tensor, arguments: list[Arguments]) -> tuple[Tensor, list[Arguments]]:
        """Returns the states that enter the first block, and the other arguments of every block.

        hidden, arguments   what transformers calls the first block and every block with
        """

    def run(self, index: int, states: Tensor, arguments: Arguments, call: Call) -> Tensor:
        """Returns the states that enter the block after block `index`; after the last block, the hidden states."""


def states_of(architecture: Architecture, hidden: int, blocks: nn.ModuleList) -> States:
    """Returns how the states of an architecture's blocks are kept.

    hidden   the number of columns of the hidden states
    blocks   transformers' decoder blocks
    """
    if architecture.carries:
        return Carried(hidden, blocks)
    if architecture.token_ids:
        return TokenIds(hidden, blocks)
    return Choices(hidden, blocks) if architecture.shares_choices else Hidden()


class Hidden:
    """The states of models whose blocks pass on hidden states alone."""

    def passed(self, hidden: Any) -> Any:
        # Most models that expect a tensor pass this tuple on to the next block.
        return (hidden,)

    def start(self, hidden: Tensor, arguments: list[Arguments]) -> tuple[Tensor, list[Arguments]]:
        return hidden, arguments

    def run(self, index: int, states: Tensor, arguments: Arguments, call: Call) -> Tensor:
        return hidden_in(call(states, *arguments[0], **arguments[1]))


class Choices:
    """The states of models in which a block may attend to the tokens that an earlier block has chosen.

    They are the hidden states and, where the next block chooses no tokens, the numbers of those chosen for each token.
    A float32 holds the numbers of 2^24 tokens exactly.

    hidden   the number of columns of the hidden states
    blocks   transformers' decoder blocks (GLM-5)
    """

    def __init__(self, hidden: int, blocks: nn.ModuleList) -> None:
        self._hidden = hidden
        self._shares = [bool(block.self_attn.skip_topk) for block in blocks]  # type: ignore[union-attr]

    def passed(self, hidden: Any) -> Any:
        return (hidden, None)

    def start(self, hidden: Tensor, arguments: list[Arguments]) -> tuple[Tensor, list[Arguments]]:
        return hidden, arguments

    def run(self, index: int, states: Tensor, arguments: Arguments, call: Call) -> Tensor:
        positional, named = arguments
        hidden, chosen = states[..., : self._hidden], states[..., self._hidden :]
        before = {"prev_topk_indices": chosen.to(torch.int32) if self._shares[index] else None}
        hidden, chosen = call(hidden, *positional, **named | before)
        is_used = index + 1 < len(self._shares) and self._shares[index + 1]
        return torch.cat([hidden, chosen.to(hidden.dtype)], -1) if is_used else hidden


class Carried:
    """The states of models whose blocks have inputs of their own, or use keys and values of earlier blocks.

    They are the hidden states, the shared keys and values that this or a later block uses, and the inputs of this block
    and of all later ones.

    hidden   the number of columns of the hidden states
    blocks   transformers' decoder blocks (Gemma 3n, Gemma 4)
    """

    def __init__(self, hidden: int, blocks: nn.ModuleList) -> None:
        attention: list[Any] = [block.self_attn for block in blocks]
        self._hidden = hidden
        self._inputs = [int(block.hidden_size_per_layer_input or 0) for block in blocks]  # type: ignore[arg-type]
        self._names = [list(inspect.signature(block.forward).parameters)[1:] for block in blocks]
        self._makers = {each.layer_type: i for i, each in enumerate(attention) if each.store_full_length_kv}
        self._last_users = {each.layer_type: i for i, each in enumerate(attention) if each.is_kv_shared_layer}
        makers = {name: attention[i] for name, i in self._makers.items()}
        self._sizes = {name: (each.k_proj.out_features, each.head_dim) for name, each in makers.items()}

    def _types(self, index: int) -> list[str]:
        """Returns the types of blocks whose shared keys and values enter block `index`."""
        return [name for name, maker in self._makers.items() if maker < index <= self._last_users.get(name, -1)]

    def passed(self, hidden: Any) -> Any:
        return hidden

    def start(self, hidden: Tensor, arguments: list[Arguments]) -> tuple[Tensor, list[Arguments]]:
        by_name = [
            named | dict(zip(names, positional, strict=False))
            for names, (positional, named) in zip(self._names, arguments, strict=True)
        ]
        inputs = [named.pop(INPUT, None) for named in by_name]
        given = [each for each in inputs if each is not None]
        states = self._joined(0, hidden, {}, torch.cat([hidden[..., :0], *given], -1))
        return states, [((), named) for named in by_name]

    def _joined(self, index: int, hidden: Tensor, shared: Shared, inputs: Tensor) -> Tensor:
        """Returns the states [batch, length, columns] that enter block `index`.

        inputs   the inputs of this block and of all later ones [batch, length, columns]
        """
        pairs = [each.transpose(1, 2).flatten(2) for name in self._types(index) for each in shared[name]]
        return torch.cat([hidden, *(pair.to(hidden.dtype) for pair in pairs), inputs], -1)

    def run(self, index: int, states: Tensor, arguments: Arguments, call: Call) -> Tensor:
        types = self._types(index)
        pairs = [self._sizes[name][0] for name in types for _ in range(2)]
        hidden, *parts = states.split([self._hidden, *pairs, sum(self._inputs[index:])], -1)
        inputs, by_head = parts.pop(), [self._by_head(types[i // 2], part) for i, part in enumerate(parts)]
        shared = dict(zip(types, zip(by_head[::2], by_head[1::2], strict=True), strict=True))
        of_block = inputs[..., : self._inputs[index]] if self._inputs[index] else None
        # A copy, since some blocks change hidden states in place.
        output = call(hidden.clone(), **arguments[1] | {INPUT: of_block, SHARED: shared})
        return self._joined(index + 1, hidden_in(output), shared, inputs[..., self._inputs[index] :])

    def _by_head(self, name: str, columns: Tensor) -> Tensor:
        return columns.unflatten(-1, (-1, self._sizes[name][1])).transpose(1, 2)


class TokenIds:
    """The states of models in which some blocks choose experts by the number of a token.

    They are the hidden states and, up to the last such block, the digits of the token's number.

    hidden   the number of columns of the hidden states
    blocks   transformers' decoder blocks (DeepSeek V4)
    """

    def __init__(self, hidden: int, blocks: nn.ModuleList) -> None:
        self._hidden = hidden
        users = [index for index, block in enumerate(blocks) if block.mlp.is_hash]  # type: ignore[union-attr]
        self._last_user = max(users, default=-1)

    def passed(self, hidden: Any) -> Any:
        return hidden

    def start(self, hidden: Tensor, arguments: list[Arguments]) -> tuple[Tensor, list[Arguments]]:
        ids = arguments[0][1][IDS]
        others = [
            (positional, {key: value for key, value in named.items() if key != IDS}) for positional, named in arguments
        ]
        digits = torch.stack([ids >> 8 * place & 255 for place in range(TOKEN_DIGITS)], -1)
        return self._joined(0, hidden, digits), others

    def _joined(self, index: int, hidden: Tensor, digits: Tensor) -> Tensor:
        """Returns the states that enter block `index`."""
        return torch.cat([hidden, digits.to(hidden.dtype)], -1) if index <= self._last_user else hidden

    def run(self, index: int, states: Tensor, arguments: Arguments, call: Call) -> Tensor:
        positional, named = arguments
        hidden, digits = states[..., : self._hidden], states[..., self._hidden :]
        ids = sum(digit << 8 * place for place, digit in enumerate(digits.long().unbind(-1)))
        output = call(hidden, *positional, **named | {IDS: ids})
        return self._joined(index + 1, hidden_in(output), digits)


def hidden_in(output: Any) -> Tensor:
    """Returns the hidden states of what a block returns, which may be a tuple that begins with them."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states
