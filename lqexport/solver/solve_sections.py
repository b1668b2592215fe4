"""Coordinate descent for EXL2 and for GPTQ's layout.

They need a module of their own. EXL2's maxima are shared by all rows of a matrix, and its scales are rounded in a way
of their own; GPTQ's zero points are multiples of the scale. A stored number moves by its exact effect: the values that
a reader would compute with the new number are formed, and the change of the loss is evaluated. So no step raises the
loss. Codes are refined as for any other grid.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lqexport.grids.grid import half
from lqexport.grids.sections import (
    Section,
    SquaredSection,
    TensorSections,
    ZeroSection,
    squared_scale,
    storable,
    storable_scales,
)
from lqexport.solver.feedback import REFINE_BLOCK, ROUNDS, backend


def refine_sections(
    weights: Tensor, hessian: Tensor, grid: TensorSections, codes: Tensor, *, sweeps: int
) -> tuple[TensorSections, Tensor]:
    """Returns new sections and new codes after coordinate descent, which never raises the loss.

    weights float32 [R, C], hessian float32 [C, C] (damped) and codes uint8 [R, C] are as for `feedback.refine`.
    """
    order, grid = grid.order, grid.clone()
    target, hessian, codes = weights[:, order], hessian[order][:, order], codes[:, order]
    values = grid.stored_values(codes)
    for _ in range(sweeps):
        for run, section in zip(grid.slices(), grid.sections, strict=True):
            for block in _blocks(section, run):
                inside = slice(block.start - run.start, block.stop - run.start)
                new = values[:, block].contiguous()
                block_codes, lines = codes[:, block].contiguous(), hessian[block]
                gradient = (values - target) @ lines.mT
                _refine_block(new, gradient, lines[:, block].contiguous(), block_codes, section, inside)
                values[:, block], codes[:, block] = new, block_codes
    return grid, codes[:, order.argsort()]


def _blocks(section: Section, run: slice) -> list[slice]:
    """Returns slices of about REFINE_BLOCK columns that hold whole groups."""
    width = section.group * max(1, REFINE_BLOCK // section.group)
    return [slice(start, min(start + width, run.stop)) for start in range(run.start, run.stop, width)]


def _refine_block(
    values: Tensor, gradient: Tensor, hessian: Tensor, codes: Tensor, section: Section,
    block: slice,
) -> None:  # fmt: skip
    """Makes ROUNDS rounds over some whole groups of a section: first each group's stored numbers, then each code.

    `values`, `gradient` and `codes` [R, B] and the section's numbers change in place.
    """
    groups = slice(block.start // section.group, block.stop // section.group)
    for _ in range(ROUNDS):
        for g in range(groups.start, groups.stop):
            where = slice((g - groups.start) * section.group, (g - groups.start + 1) * section.group)
            arguments = codes[:, where], values[:, where], gradient[:, where], hessian[where, where]
            for change in _moves(section, g, *arguments):
                values[:, where] += change
                gradient += change @ hessian[where]
        fixed = section.part(groups).grid()
        backend(values).refine_block(values, gradient, hessian, codes, fixed, slice(0, values.shape[1]), False, 1)


def _moves(
    section: Section, g: int, codes: Tensor, values: Tensor, gradient: Tensor, hessian: Tensor
) -> Iterator[Tensor]:
    """Moves the stored numbers of group g one after the other, and yields by what each move changes the values [R, g].

    The caller has to add a change to `values` and to update `gradient` before it asks for the next one.
    """
    if isinstance(section, SquaredSection):
        levels = codes + section.levels[0, 0]
        yield _move_maximum(section, g, levels, values, gradient, hessian)
        yield _move_subs(section, g, levels, values, gradient, hessian)
        return
    yield _move_scales(section, g, codes, values, gradient, hessian)


def _loss_change(change: Tensor, gradient: Tensor, hessian: Tensor) -> Tensor:
    """Returns by how much a change [R, g] of the values raises each row's loss, float64 [R]."""
    return ((2 * gradient + change @ hessian) * change).sum(1, dtype=torch.float64)


def _slope_and_curvature(values: Tensor, gradient: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Returns slope and curvature [R] of each row's loss along a common growth of all values of the group.

    The loss is least where the values grow by the share -slope / curvature.
    """
    slope = (values * gradient).sum(1, dtype=torch.float64)
    return slope, ((values @ hessian) * values).sum(1, dtype=torch.float64)


def _move_maximum(
    section: SquaredSection, g: int, levels: Tensor, values: Tensor, gradient: Tensor, hessian: Tensor
) -> Tensor:
    """Moves the maximum M of group g to the best number that the file can hold.

    Returns by how much the values change [R, g]: zero if that number is not better.
    """
    slope, curvature = (rows.sum() for rows in _slope_and_curvature(values, gradient, hessian))
    share = torch.where(curvature > 0, -slope / curvature, 0.0)
    bits = section.levels.shape[1].bit_length() - 1
    maximum = storable((section.maxima[g] * (1 + share)).float(), bits)
    new = half(levels * squared_scale(maximum, section.subs[:, g])[:, None])
    change = new - values
    better = _loss_change(change, gradient, hessian).sum() < 0
    section.maxima[g] = torch.where(better, maximum, section.maxima[g])
    return torch.where(better, change, 0.0)


def _move_subs(
    section: SquaredSection, g: int, levels: Tensor, values: Tensor, gradient: Tensor, hessian: Tensor
) -> Tensor:
    """Moves each row's scale code of group g to the better of the two around its best scale.

    Returns by how much the values change [R, g]: zero in rows where neither is better.
    """
    slope, curvature = _slope_and_curvature(values, gradient, hessian)
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


def _move_scales(
    section: ZeroSection, g: int, codes: Tensor, values: Tensor, gradient: Tensor, hessian: Tensor
) -> Tensor:
    """Moves the scale of each row's group g to the best number that the file can hold.

    Zero points stay: with the codes fixed, another zero point shifts the whole group by a step. Returns by how much the
    values change [R, g]: zero in rows where that number is not better.
    """
    slope, curvature = _slope_and_curvature(values, gradient, hessian)
    share = torch.where(curvature > 0, -slope / curvature, 0.0).float()
    scale = storable_scales(section.scales[:, g] * (1 + share))
    change = half(scale[:, None] * (codes - section.zeros[:, g, None].float())) - values
    better = _loss_change(change, gradient, hessian) < 0
    section.scales[:, g] = torch.where(better, scale, section.scales[:, g])
    return torch.where(better[:, None], change, 0.0)
