"""Coordinate descent for EXL2, whose maxima are shared by all rows of a matrix and whose scales round in their own way.

Maxima and scale codes are moved by their exact effect: the values that ExLlamaV2 would compute with the new number are
formed and the change of the loss is evaluated, so no step raises it. Codes are refined as for any other grid.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lqexport.fit_sections import storable
from lqexport.grid import Section, TensorSections, half, squared_scale
from lqexport.solve import REFINE_BLOCK, backend


def refine_sections(
    weights: Tensor, hessian: Tensor, grid: TensorSections, codes: Tensor, *, sweeps: int
) -> tuple[TensorSections, Tensor]:
    """As `solve.refine`, for EXL2: weights float32 [R, C], hessian float32 [C, C] (damped), codes uint8 [R, C]."""
    order, grid = grid.order, grid.clone()
    target, hessian, codes = weights[:, order], hessian[order][:, order], codes[:, order]
    values = grid.stored_values(codes)
    for _ in range(sweeps):
        gradient = (values - target) @ hessian
        for run, part in zip(grid.slices(), grid.sections, strict=True):
            for block in _blocks(part, run):
                inside = slice(block.start - run.start, block.stop - run.start)
                new = values[:, block].contiguous()
                block_codes = codes[:, block].contiguous()
                _refine_block(new, gradient[:, block].contiguous(), hessian[block, block].contiguous(), block_codes,
                              part, inside)  # fmt: skip
                gradient += (new - values[:, block]) @ hessian[block]
                values[:, block], codes[:, block] = new, block_codes
    return grid, codes[:, order.argsort()]


def _blocks(section: Section, run: slice) -> list[slice]:
    """Whole groups, about REFINE_BLOCK columns at once."""
    width = section.group * max(1, REFINE_BLOCK // section.group)
    return [slice(start, min(start + width, run.stop)) for start in range(run.start, run.stop, width)]


def _refine_block(
    values: Tensor, gradient: Tensor, hessian: Tensor, codes: Tensor, section: Section, block: slice
) -> None:
    """One sweep over whole groups of one section: first each maximum and the scale codes under it, then each code.

    `values`, `codes` [R, B] and the section's numbers change in place."""
    groups = slice(block.start // section.group, block.stop // section.group)
    levels = codes + section.levels[0, 0]
    for g in range(groups.start, groups.stop):
        where = slice((g - groups.start) * section.group, (g - groups.start + 1) * section.group)
        for move in (_move_maximum, _move_subs):
            change = move(section, g, levels[:, where], values[:, where], gradient[:, where], hessian[where, where])
            values[:, where] += change
            gradient += change @ hessian[where]
    fixed = replace(section, maxima=section.maxima[groups], subs=section.subs[:, groups].contiguous()).grid()
    backend(values).refine_block(values, gradient, hessian, codes, fixed, slice(0, values.shape[1]), False)


def _loss_change(change: Tensor, gradient: Tensor, hessian: Tensor) -> Tensor:
    """What a change [R, g] of the values does to each row's loss, float64 [R]."""
    return ((2 * gradient + change @ hessian) * change).sum(1, dtype=torch.float64)


def _best_factor(values: Tensor, gradient: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and curvature [R] of each row's loss where all values of the group grow by a common share."""
    slope = (values * gradient).sum(1, dtype=torch.float64)
    return slope, ((values @ hessian) * values).sum(1, dtype=torch.float64)


def _move_maximum(
    section: Section, g: int, levels: Tensor, values: Tensor, gradient: Tensor, hessian: Tensor
) -> Tensor:
    """Move M of one group to the best that the file can hold; what it changes [R, g], zero where that is not better."""
    slope, curvature = (part.sum() for part in _best_factor(values, gradient, hessian))
    share = torch.where(curvature > 0, -slope / curvature, 0.0)
    bits = section.levels.shape[1].bit_length() - 1
    maximum = storable((section.maxima[g] * (1 + share)).float(), bits)
    new = half(levels * squared_scale(maximum, section.subs[:, g])[:, None])
    change = new - values
    better = _loss_change(change, gradient, hessian).sum() < 0
    section.maxima[g] = torch.where(better, maximum, section.maxima[g])
    return torch.where(better, change, 0.0)


def _move_subs(section: Section, g: int, levels: Tensor, values: Tensor, gradient: Tensor, hessian: Tensor) -> Tensor:
    """The same for each row's scale code: the two around its best scale are tried."""
    slope, curvature = _best_factor(values, gradient, hessian)
    share = torch.where(curvature > 0, -slope / curvature, 0.0).float()
    maximum = section.maxima[g]
    wanted = squared_scale(maximum, section.subs[:, g]) * (1 + share)
    below = (16 * (wanted / torch.where(maximum == 0, torch.inf, maximum)).clamp_min(0).sqrt()).floor() - 1
    best, change = torch.zeros_like(slope), torch.zeros_like(values)
    subs = section.subs[:, g].clone()
    for candidate in (below, below + 1):
        code = candidate.clamp(0, 15).to(torch.int16)
        trial = half(levels * squared_scale(maximum, code)[:, None]) - values
        gain = _loss_change(trial, gradient, hessian)
        better = gain < best
        best = torch.where(better, gain, best)
        subs = torch.where(better, code, subs)
        change = torch.where(better[:, None], trial, change)
    section.subs[:, g] = subs
    return change
