"""The solver's blocks on the device (feedback.cu, refine.cu, fit.cu): as `cpu`, with tensors for arrays.

R rows, B columns of a block, G groups, K levels; tensors are float32 and contiguous unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lqexport.kernels import cuda

KERNELS = {"feedback.cu": ["feedback_block"], "refine.cu": ["refine_block"], "fit.cu": ["fit_groups"]}
THREADS = 128
LANES_PER_GROUP = 16
MOST_COLUMNS = 128
"""Columns that a block of `feedback_block` may have."""


@dataclass(frozen=True)
class Stored:
    """A block's scales or offsets as the file stores them: supers [R, G / span], subs int16 [R, G], changed in place.

    `supers` is None where the format has no such number; see `formats.codec.ScaleFormat` for the rest.
    """

    supers: Tensor | None = None
    subs: Tensor | None = None
    span: int = 1
    low: int = 1
    high: int = 1
    sign: int = 1
    power: bool = False

    def arguments(self) -> list[cuda.Argument]:
        return [self.supers, self.subs, self.span, self.low, self.high, self.sign, int(self.power)]


def feedback_block(
    weights: Tensor, factor: Tensor, scale: Tensor, offset: Tensor, levels: Tensor, uniform: bool, half: bool
) -> tuple[Tensor, Tensor]:
    """Codes uint8 and errors [R, B] of one block of at most MOST_COLUMNS columns, with the bits of
    `cpu.feedback_block`, which describes the arguments; `weights` stay as they are."""
    rows, width = weights.shape
    if width > MOST_COLUMNS:
        raise ValueError(f"A block of error feedback has at most {MOST_COLUMNS} columns, not {width}.")
    codes, errors = torch.empty_like(weights, dtype=torch.uint8), torch.empty_like(weights)
    arguments = [
        weights, factor, scale, offset, levels, *levels.shape, int(uniform), int(half), rows, width, codes, errors,
    ]  # fmt: skip
    cuda.launch("feedback.cu", "feedback_block", _blocks(rows, 32), THREADS, arguments)
    return codes, errors


def refine_block(
    values: Tensor, gradient: Tensor, hessian: Tensor, codes: Tensor, levels: Tensor, uniform: bool, group: int,
    scale: Stored, offset: Stored, refit: bool, half: bool,
) -> None:  # fmt: skip
    """One sweep of coordinate descent over one block, in place; see `cpu.refine_block`."""
    rows, width = values.shape
    arguments = [
        values, gradient, hessian, codes, levels, *levels.shape, int(uniform), int(half), group, rows, width,
        *scale.arguments(), *offset.arguments(), int(refit),
    ]  # fmt: skip
    cuda.launch("refine.cu", "refine_block", _blocks(rows, 32), THREADS, arguments)


def fit_groups(
    weights: Tensor, weight: Tensor, levels: Tensor, uniform: bool, has_offset: bool, not_positive: bool, cuts: Tensor,
    fine: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scale and shift [R, G] of every group with the least weighted squared error found; see `cpu.fit_groups`."""
    rows, (groups, width) = len(weights), weight.shape
    scale, shift = torch.empty(2, rows, groups, device=weights.device)
    arguments = [
        weights, weight, levels, len(levels), int(uniform), int(has_offset), int(not_positive), cuts, len(cuts), fine,
        len(fine), rows, groups, width, scale, shift,
    ]  # fmt: skip
    cuda.launch("fit.cu", "fit_groups", _blocks(rows * groups, LANES_PER_GROUP), THREADS, arguments)
    return scale, shift


def _blocks(items: int, lanes: int) -> int:
    """Blocks for so many items of so many lanes each."""
    return -(-items * lanes // THREADS)
