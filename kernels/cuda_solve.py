"""The solver's inner loops on a GPU (feedback.cu, refine.cu, fit.cu): what `cpu` does, but for tensors.

In the shapes, R is rows, B columns of a block, G groups, and K levels. Tensors are float32 and contiguous unless stated
otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lqexport.formats.codec import FLOAT16, FloatFormat
from lqexport.kernels import cuda

KERNELS = {"feedback.cu": ["feedback_block"], "refine.cu": ["refine_block"], "fit.cu": ["fit_groups"]}
THREADS = 128
LANES_PER_GROUP = 16
MOST_COLUMNS = 128
"""The most columns of a block of `feedback_block`."""


@dataclass(frozen=True)
class Stored:
    """A block's scales or offsets as the file stores them. Kernels change them in place.

    supers   [R, G / span], or None if the format has no such number
    subs     int16 [R, G], or None with it

    `formats.codec.ScaleFormat` describes the other fields.
    """

    supers: Tensor | None = None
    subs: Tensor | None = None
    span: int = 1
    low: int = 1
    high: int = 1
    sign: int = 1
    floats: FloatFormat = FLOAT16
    step: int = 1

    def arguments(self) -> list[cuda.Argument]:
        """Returns the fields in the order of a kernel's arguments."""
        return [self.supers, self.subs, self.span, self.low, self.high, self.sign, *self.floats, self.step]


def feedback_results(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Returns room for the codes, uint8 [R, B], and the errors [R, B] of a block of error feedback.

    Raises ValueError if the block has more than MOST_COLUMNS columns.
    """
    if (width := weights.shape[1]) > MOST_COLUMNS:
        raise ValueError(f"A block of error feedback has at most {MOST_COLUMNS} columns, not {width}.")
    return torch.empty_like(weights, dtype=torch.uint8), torch.empty_like(weights)


def feedback_block(
    weights: Tensor, upper: Tensor, scale: Tensor, offset: Tensor, levels: Tensor, uniform: bool, rounding: int
) -> tuple[Tensor, Tensor]:
    """Returns the codes, uint8 [R, B], and the errors [R, B] of one block, bitwise equal to those of
    `cpu.feedback_block`.

    The arguments are those of `cpu.feedback_block`, but `weights` do not change. Raises ValueError if the block has
    more than MOST_COLUMNS columns.
    """
    rows, width = weights.shape
    codes, errors = feedback_results(weights)
    arguments = [
        weights, upper, scale, offset, levels, *levels.shape, int(uniform), rounding, rows, width, codes, errors,
    ]  # fmt: skip
    cuda.launch("feedback.cu", "feedback_block", blocks_of(rows, 32), THREADS, arguments)
    return codes, errors


def refine_block(
    values: Tensor, gradient: Tensor, hessian: Tensor, codes: Tensor, levels: Tensor, uniform: bool, group: int,
    scale: Stored, offset: Stored, refit: bool, rounding: int, rounds: int,
) -> None:  # fmt: skip
    """Makes rounds of coordinate descent over a block, in place; see `refine.refine_block`."""
    rows, width = values.shape
    arguments = [
        values, gradient, hessian, codes, levels, *levels.shape, int(uniform), rounding, group, rows, width,
        *scale.arguments(), *offset.arguments(), int(refit), rounds,
    ]  # fmt: skip
    cuda.launch("refine.cu", "refine_block", blocks_of(rows, 32), THREADS, arguments)


def fit_groups(
    weights: Tensor, weight: Tensor, levels: Tensor, uniform: bool, has_offset: bool, not_positive: bool, cuts: Tensor,
    fine: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns every group's scale and shift, [R, G], with the least weighted squared error; see `cpu.fit_groups`."""
    rows, (groups, width) = len(weights), weight.shape
    scale, shift = torch.empty(2, rows, groups, device=weights.device)
    arguments = [
        weights, weight, levels, len(levels), int(uniform), int(has_offset), int(not_positive), cuts, len(cuts), fine,
        len(fine), rows, groups, width, scale, shift,
    ]  # fmt: skip
    cuda.launch("fit.cu", "fit_groups", blocks_of(rows * groups, LANES_PER_GROUP), THREADS, arguments)
    return scale, shift


def blocks_of(items: int, lanes: int) -> int:
    """Returns the number of blocks of threads for `items` items of `lanes` lanes each."""
    return -(-items * lanes // THREADS)
