"""The solver's inner loops in plain torch, for any device: all rows at once, columns in a loop.

The arithmetic is that of `lqexport.kernels.cpu`; a test checks that both give the same result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lqexport.formats.codec import Rounding
from lqexport.grids.grid import Numbers, TensorGrid, nearest_level, round_sub, round_super, rounded, rounded_step
from lqexport.runtime.tiles import product


def feedback_block(
    weights: Tensor, upper: Tensor, scale: Tensor, offset: Tensor, levels: Tensor, uniform: bool, rounding: Rounding
) -> tuple[Tensor, Tensor]:
    """Returns codes uint8 [R, B] and errors float32 [R, B] of one block of columns, solved in turn.

    The arguments are those of `kernels.cpu.feedback_block`; `upper` [B, B] is the block's part of U. `weights` change
    in place.
    """
    codes, errors = torch.empty_like(weights, dtype=torch.uint8), torch.empty_like(weights)
    for i in range(weights.shape[1]):
        codes[:, i], value = _round(weights[:, i], scale[:, i], offset[:, i], levels, uniform, rounding)
        error = (weights[:, i] - value) / upper[i, i]
        errors[:, i] = error
        weights[:, i + 1 :] -= error[:, None] * upper[i, i + 1 :]
    return codes, errors


def refine_block(
    values: Tensor, gradient: Tensor, hessian: Tensor, codes: Tensor, grid: TensorGrid, block: slice, refit: bool,
    rounds: int,
) -> None:  # fmt: skip
    """Makes rounds of coordinate descent over the columns of `block`.

    `values` [R, B], `gradient` [R, B], `codes` [R, C] and the grid's stored numbers change in place.
    """
    for _ in range(rounds):
        if refit and grid.offset:
            _refit(grid.offset, torch.ones_like(values), values, gradient, hessian, grid.group, block)
        if refit and grid.scale:
            basis = grid.levels.expand(len(values), -1).gather(1, codes[:, block].long())
            _refit(grid.scale, basis, values, gradient, hessian, grid.group, block)
        _move_codes(values, gradient, hessian, codes, grid, block)


def _move_codes(
    values: Tensor, gradient: Tensor, hessian: Tensor, codes: Tensor, grid: TensorGrid, block: slice
) -> None:
    """Moves each code of the block in turn to the best one."""
    scale, offset = grid.per_group(len(values))
    for i in range(values.shape[1]):
        column = block.start + i
        column_scale, column_offset = scale[:, column // grid.group], offset[:, column // grid.group]
        step = -gradient[:, i] / hessian[i, i]
        code, value = _round(values[:, i] + step, column_scale, column_offset, grid.levels, grid.uniform, grid.rounding)
        keep = (column_scale == 0) | (code == codes[:, column])
        if grid.rounding:
            # Values are rounded, so the nearest code may be farther from the minimum than the present one.
            change = value - values[:, i]
            keep |= change * (change - 2 * step) >= 0
        codes[:, column] = torch.where(keep, codes[:, column], code)
        change = torch.where(keep, 0, value - values[:, i])
        values[:, i] += change
        gradient += change[:, None] * hessian[i]


def table_products(hessian: Tensor, codes: Tensor, count: int) -> Tensor:
    """Returns P^T H P for each row, float64 [R, K, K]; P [C, K] is 1 where a column has a code, else 0."""
    indicator = torch.nn.functional.one_hot(codes.long(), count).to(hessian.dtype)  # [R, C, K]
    # One wide product: a narrow product for each row takes several times as long.
    product = (hessian @ indicator.movedim(1, 0).flatten(1)).unflatten(1, (len(codes), count))  # [C, R, K]
    return torch.einsum("rck,crl->rkl", indicator, product).double()


def _round(
    target: Tensor, scale: Tensor, offset: Tensor, levels: Tensor, uniform: bool, rounding: Rounding
) -> tuple[Tensor, Tensor]:
    """Returns the code and the value [R] of the level nearest to each target [R]."""
    steps = (target - offset) / torch.where(scale == 0, torch.inf, scale)
    code = nearest_level(steps[:, None], levels, uniform)
    level = levels.expand(len(target), -1).gather(1, code.long())[:, 0]
    value = rounded(rounded_step(scale * level, rounding) + offset, rounding)
    return code[:, 0], value


def _refit(
    numbers: Numbers, basis: Tensor, values: Tensor, gradient: Tensor, hessian: Tensor, group: int, block: slice
) -> None:
    """Moves the block's stored scales or offsets, with the codes fixed, to the values of least loss.

    First each float16, then each integer, moves to the number nearest to its minimum that the file can hold, if the
    loss falls. A value changes by `basis` [R, B] when its scale or offset changes by 1.
    """
    form = numbers.format
    first, last = block.start // group, block.stop // group
    supers = numbers.supers[:, first // form.span : last // form.span]
    subs = numbers.subs[:, first:last]
    for k in range(supers.shape[1]):
        columns = slice(k * group * form.span, (k + 1) * group * form.span)
        shared = subs[:, k * form.span : (k + 1) * form.span].repeat_interleave(group, 1)
        direction = form.sign * shared * basis[:, columns]
        step = _best_step(direction, gradient[:, columns], hessian[columns, columns])
        new = round_super(supers[:, k] + step, form)
        supers[:, k] += _move(new - supers[:, k], step, direction, columns, values, gradient, hessian)
    if not form.two_level:
        return
    for g in range(subs.shape[1]):
        columns = slice(g * group, (g + 1) * group)
        direction = form.sign * supers[:, g // form.span, None] * basis[:, columns]
        step = _best_step(direction, gradient[:, columns], hessian[columns, columns])
        new = round_sub(subs[:, g] + step, form)
        subs[:, g] += _move(new - subs[:, g], step, direction, columns, values, gradient, hessian).to(subs.dtype)


def _best_step(direction: Tensor, gradient: Tensor, hessian: Tensor) -> Tensor:
    """Returns the step [R] along each row's direction that minimises the loss: minus slope over curvature."""
    slope = (direction.double() * gradient).sum(1)
    curvature = (direction.double() * product(direction, hessian)).sum(1)
    return torch.where(curvature > 0, -slope / curvature, 0.0).float()


def _move(
    change: Tensor, step: Tensor, direction: Tensor, columns: slice, values: Tensor, gradient: Tensor, hessian: Tensor
) -> Tensor:
    """Applies the change [R] along the direction to rows whose loss falls. Returns the applied change, else 0."""
    change = torch.where(change * (change - 2 * step) < 0, change, 0.0)
    moved = change[:, None] * direction
    values[:, columns] += moved
    gradient += product(moved, hessian[columns])
    return change
