"""Finds the tensors of experts in checkpoints that store all experts of a block in one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from lqexport.converters.models.architecture import EACH, Architecture, Config, Stack
from lqexport.converters.models.tensor_names import block_module
from lqexport.errors import UserError


class ExpertRows(NamedTuple):
    """The rows of a stored tensor [experts, rows, ...] that are one tensor of one expert.

    stored       the name of the stored tensor
    expert       the expert's number
    number       which of the tensors that share the expert's rows it is
    stack        which tensors share them, and how
    """

    stored: str
    expert: int
    number: int
    stack: Stack

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the expert's tensor, from that of the stored tensor."""
        rows, *others = _rows_first(stored, self.stack)
        return (rows // len(self.stack.tensors), *others)

    def read(self, stored: Any) -> Tensor:
        """Returns the expert's tensor from an opened slice of the stored tensor, `safe_open(...).get_slice`."""
        count, stack = len(self.stack.tensors), self.stack
        if not stack.transposed and not stack.interleaved:  # only the bytes of these rows are read
            size = stored.get_shape()[1] // count
            part: Tensor = stored[self.expert, self.number * size : (self.number + 1) * size]
            return part
        whole: Tensor = stored[self.expert]
        rows = whole.T if stack.transposed else whole
        size = len(rows) // count
        rows_of_part = slice(self.number, None, count) if stack.interleaved else slice(self.number * size, None)
        return rows[rows_of_part][:size].contiguous()

    def span(self, stored: tuple[int, ...], nbytes: int) -> tuple[int, int]:
        """Returns the first byte and the number of bytes that must be read, within the stored tensor's bytes.

        stored   shape of the stored tensor
        nbytes   number of its bytes
        """
        expert = nbytes // stored[0]
        if self.stack.transposed or self.stack.interleaved:
            return self.expert * expert, expert
        part = expert // len(self.stack.tensors)
        return self.expert * expert + self.number * part, part


def experts_within(
    architecture: Architecture, config: Config, names: Iterable[str], renamed: Callable[[str], str],
    shape: Callable[[str], tuple[int, ...]],
) -> dict[str, ExpertRows]:  # fmt: skip
    """Returns the tensors of experts that stored tensors hold, by `stacked` of the architecture: name -> where it is.

    config    the model's config, under the usual names of keys
    names     names of the stored tensors
    renamed   returns the name of a stored tensor as the model has it
    shape     returns the shape of a stored tensor

    Raises UserError if a stored tensor cannot be such a stack by its shape.
    """
    located: dict[str, ExpertRows] = {}
    for stored in names:
        layer, module, end = block_module(architecture, renamed(stored)) or (0, "", "")
        if usual := architecture.stacked.get(f"{module}.{end}"):
            stack = _as_stored(usual, config, shape(stored))
            experts = _checked(stored, shape(stored), stack)[0]
            located |= {
                f"{architecture.blocks}.{layer}.{tensor.replace(EACH, str(expert))}": ExpertRows(
                    stored, expert, number, stack
                )
                for expert in range(experts)
                for number, tensor in enumerate(stack.tensors)
            }
    return located


def _as_stored(stack: Stack, config: Config, shape: tuple[int, ...]) -> Stack:
    """Returns the stack of a checkpoint that may be transposed, as the shape of its tensor tells."""
    other = stack.columns is not None and shape[-1] != config.get(stack.columns)
    return replace(stack, transposed=stack.transposed or other)


def _checked(stored: str, shape: tuple[int, ...], stack: Stack) -> tuple[int, ...]:
    weight = stack.tensors[0].endswith(".weight")
    if (weight and len(shape) != 3) or len(shape) < 2:
        raise UserError(f"{stored} should have {3 if weight else 2} dimensions, but its shape is {list(shape)}.")
    rows = _rows_first(shape, stack)[0]
    if rows % len(stack.tensors):
        raise UserError(f"{stored} has {rows} rows, which {' and '.join(stack.tensors)} cannot share.")
    return shape


def _rows_first(stored: tuple[int, ...], stack: Stack) -> tuple[int, ...]:
    """Returns the shape of one expert's part of a stored tensor, rows first."""
    return stored[:0:-1] if stack.transposed else stored[1:]
