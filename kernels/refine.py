"""Coordinate descent on the CPU, compiled with numba: one block of columns, in parallel over rows.

`lqexport.solver.solve_cpu` calls it. All arrays are float32 and C-contiguous unless stated otherwise. In the shapes, R
is rows, B columns of a block, G groups of columns, and K levels. As in `lqexport.kernels.cpu`, no loop has `fastmath`.

A row's stored numbers move along few directions: each group has one for its scale (the levels of its codes) and one for
its offset (ones). So slopes and curvatures are kept for these directions alone, and the gradient of the columns is
brought up to date once for all numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from lqexport.kernels.cpu import ONE, ZERO, _nearest, _number, _round_float, _value


class Block(NamedTuple):
    """The arguments that all rows of a block share.

    hessian   [B, B]
    inverse   [B], 1 / H_ii, or 0 if H_ii is not positive
    summed    [G, B], the sums of H over each group's rows: what a unit step of an offset does to the gradient
    offsets   [G, G], the sums of H over two groups: the curvatures of offsets
    levels    [K], the row's table
    uniform   whether the levels are consecutive integers
    rounding  how values are rounded, a number of `formats.codec.Rounding`
    refit     whether stored numbers move
    """

    hessian: NDArray[np.float32]
    inverse: NDArray[np.float32]
    summed: NDArray[np.float32]
    offsets: NDArray[np.float32]
    levels: NDArray[np.float32]
    uniform: bool
    rounding: int
    refit: bool


class Row(NamedTuple):
    """One row of a block, and its work space.

    values, gradient   [B]
    codes     [B], the codes as float32 numbers
    level     [B], the level of each code
    wanted    [B], the code that each column would move to
    step, per_step, offset   [B], each column's scale, its inverse (0 if it is 0), and its offset
    spread    [G, B], what a unit step of a group's scale does to the gradient
    scales    [G, G], the curvatures of scales
    mixed     [G, G], those of offsets (first axis) with scales
    slopes    [2, G], those of scales, and those of offsets
    moved     [2, G], by how much scales and offsets have moved since `_apply`
    """

    values: NDArray[np.float32]
    gradient: NDArray[np.float32]
    codes: NDArray[np.float32]
    level: NDArray[np.float32]
    wanted: NDArray[np.float32]
    step: NDArray[np.float32]
    per_step: NDArray[np.float32]
    offset: NDArray[np.float32]
    spread: NDArray[np.float32]
    scales: NDArray[np.float32]
    mixed: NDArray[np.float32]
    slopes: NDArray[np.float32]
    moved: NDArray[np.float32]


@njit(cache=True)
def _shared(hessian, groups):
    """Returns `inverse`, `summed` and `offsets` of a block."""
    width = hessian.shape[0]
    group = width // groups
    inverse, summed = np.zeros(width, np.float32), np.zeros((groups, width), np.float32)
    for i in range(width):
        if hessian[i, i] > 0:
            inverse[i] = ONE / hessian[i, i]
        line = summed[i // group]
        for j in range(width):
            line[j] += hessian[i, j]
    return inverse, summed, _by_group(summed)


@njit(cache=True)
def _by_group(lines):
    """Returns the sums over each group of columns, [G, G], for lines [G, B]."""
    groups, width = lines.shape
    sums = np.zeros((groups, groups), np.float32)
    for k in range(groups):
        for j in range(width):
            sums[k, j // (width // groups)] += lines[k, j]
    return sums


@njit(cache=True)
def _project(row):
    """Sets slopes and curvatures from the gradient, `spread` and the levels."""
    groups, width = row.spread.shape
    group = width // groups
    turned = np.empty((width, groups), np.float32)  # so that the sums of all groups run side by side
    for k in range(groups):
        line = row.spread[k]
        for j in range(width):
            turned[j, k] = line[j]
    for n in range(groups):
        scales, mixed = row.scales[n], row.mixed[n]
        scales[:] = 0
        mixed[:] = 0
        of_scale, of_offset = ZERO, ZERO
        for i in range(n * group, (n + 1) * group):
            source, level = turned[i], row.level[i]
            for k in range(groups):
                scales[k] += level * source[k]
            for k in range(groups):
                mixed[k] += source[k]
            of_scale += level * row.gradient[i]
            of_offset += row.gradient[i]
        row.slopes[0, n] = of_scale
        row.slopes[1, n] = of_offset


@njit(cache=True, inline="always")
def _shift(k, amount, row, block, of_scale):
    """Moves the scale or offset of group k by `amount`, and brings all slopes up to date."""
    slopes, moved = row.slopes, row.moved
    for n in range(slopes.shape[1]):
        slopes[0, n] += amount * (row.scales[k, n] if of_scale else row.mixed[k, n])
        slopes[1, n] += amount * (row.mixed[n, k] if of_scale else block.offsets[k, n])
    moved[0 if of_scale else 1, k] += amount


@njit(cache=True)
def _move_numbers(stored, r, row, block, of_scale):
    """Moves the stored scales or offsets of row r to the best values that the file can hold.

    Moves each float, and then, in two-level formats, each group's integer. The loss is quadratic in one number, so the
    best stored value is the one nearest to the minimum. A move is made only if it lowers the loss. Returns whether any
    number has moved.
    """
    supers, subs, span = stored.supers[r], stored.subs[r], stored.span
    slopes = row.slopes[0 if of_scale else 1]
    curvatures = row.scales if of_scale else block.offsets
    any_moved = False
    for n in range(supers.shape[0]):
        slope, curvature = 0.0, 0.0
        for k in range(n * span, (n + 1) * span):
            slope += stored.sign * subs[k] * slopes[k]
            for m in range(n * span, (n + 1) * span):
                curvature += subs[k] * subs[m] * curvatures[k, m]
        step = -slope / curvature if curvature > 0 else 0.0
        change = _round_float(supers[n] + step, stored) - supers[n]
        if change * (change - 2 * step) < 0:  # the quadratic is lower at `change` than at 0
            supers[n] += np.float32(change)
            any_moved = True
            for k in range(n * span, (n + 1) * span):
                _shift(k, np.float32(change * stored.sign * subs[k]), row, block, of_scale)
    if stored.low == stored.high:
        return any_moved
    for k in range(subs.shape[0]):
        along = np.float64(stored.sign * supers[k // span])
        curvature = along * along * curvatures[k, k]
        step = -along * slopes[k] / curvature if curvature > 0 else 0.0
        best = np.rint(subs[k] + step) if stored.step == 1 else subs[k] + stored.step * np.rint(step / stored.step)
        change = min(max(best, stored.low), stored.high) - subs[k]
        if change * (change - 2 * step) < 0:
            subs[k] += int(change)
            any_moved = True
            _shift(k, np.float32(change * along), row, block, of_scale)
    return any_moved


@njit(cache=True)
def _apply(row, block):
    """Brings values and gradient up to date with the scales and offsets that have moved."""
    groups, width = row.spread.shape
    group = width // groups
    for k in range(groups):
        by_scale, by_offset = row.moved[0, k], row.moved[1, k]
        if by_scale == 0 and by_offset == 0:
            continue
        for i in range(k * group, (k + 1) * group):
            row.values[i] += by_scale * row.level[i] + by_offset
        spread, summed = row.spread[k], block.summed[k]
        for j in range(width):
            row.gradient[j] += by_scale * spread[j] + by_offset * summed[j]
    row.moved[:] = 0


@njit(cache=True, inline="always")
def _next_to_move(row, block, start):
    """Returns the first column from `start` on whose code should change, and sets the code that it wants.

    Returns the number of columns if there is none.
    """
    width, levels = row.values.shape[0], block.levels
    i = start
    if block.uniform:
        low, top = levels[0], np.float32(levels.shape[0] - 1)
        for j in range(width):  # all columns, since a loop from 0 is vectorised
            target = (row.values[j] - row.gradient[j] * block.inverse[j] - row.offset[j]) * row.per_step[j]
            row.wanted[j] = min(max(np.rint(target - low), ZERO), top)
        while i < width and row.wanted[i] == row.codes[i]:
            i += 1
    else:
        while i < width:
            target = (row.values[i] - row.gradient[i] * block.inverse[i] - row.offset[i]) * row.per_step[i]
            row.wanted[i] = _nearest(target, levels, False)
            if row.wanted[i] != row.codes[i]:
                break
            i += 1
    return i


@njit(cache=True)
def _change_code(row, block, k, i, level, change):
    """Gives column i of group k another level and changes its value; brings all that depends on it up to date."""
    line, step = block.hessian[i], level - row.level[i]
    row.codes[i] = row.wanted[i]
    row.level[i] = level
    row.values[i] += change
    gradient = row.gradient
    for j in range(line.shape[0]):
        gradient[j] += change * line[j]
    if block.refit:
        _follow(row, block, k, i, step, change)


@njit(cache=True)
def _follow(row, block, k, i, step, change):
    """Brings slopes and curvatures up to date after the level and the value of column i of group k have changed."""
    line, spread = block.hessian[i], row.spread[k]
    for n in range(row.spread.shape[0]):
        along = row.spread[n, i]
        row.scales[k, n] += step * along
        row.scales[n, k] += step * along
        row.mixed[n, k] += step * block.summed[n, i]
        row.slopes[0, n] += change * along
        row.slopes[1, n] += change * block.summed[n, i]
    row.scales[k, k] += step * step * line[i]
    row.slopes[0, k] += step * row.gradient[i]
    for j in range(line.shape[0]):
        spread[j] += step * line[j]


@njit(cache=True)
def _expand(r, row, scale, offset):
    """Sets `step`, `per_step` and `offset` of each column of row r from the stored numbers."""
    groups, width = row.spread.shape
    group = width // groups
    for k in range(groups):
        step, shift = _number(scale, r, k, ONE), _number(offset, r, k, ZERO)
        inverse = ONE / step if step != 0 else ZERO
        for i in range(k * group, (k + 1) * group):
            row.step[i] = step
            row.per_step[i] = inverse
            row.offset[i] = shift


@njit(cache=True)
def _move_codes(row, block):
    """Moves each code in turn. Returns whether any has moved.

    Rounding can make the nearest level's value farther than the old one, so the loss decides where values are rounded.
    """
    groups, width = row.spread.shape
    group = width // groups
    any_moved = False
    i = _next_to_move(row, block, 0)
    while i < width:
        if row.step[i] != 0 and block.inverse[i] > 0:
            level = block.levels[int(row.wanted[i])]
            change = _value(row.step[i], level, row.offset[i], block.rounding) - row.values[i]
            if not block.rounding or change * (change + 2 * row.gradient[i] * block.inverse[i]) < 0:
                any_moved = True
                _change_code(row, block, i // group, i, level, change)
        i = _next_to_move(row, block, i + 1)
    return any_moved


@njit(cache=True)
def _refit(r, row, block, scale, offset):
    """Moves the stored offsets and then the stored scales of row r. Returns whether any has moved."""
    any_moved = False
    if offset.present:
        any_moved |= _move_numbers(offset, r, row, block, False)
    if scale.present:
        any_moved |= _move_numbers(scale, r, row, block, True)
    _apply(row, block)
    return any_moved


@njit(cache=True)
def _refine_row(r, row, block, codes, scale, offset, rounds):
    """Makes the rounds of one row."""
    for i in range(codes.shape[0]):
        row.codes[i] = codes[i]
        row.level[i] = block.levels[codes[i]]
    if block.refit:
        _project(row)
    for _ in range(rounds):
        any_moved = block.refit and _refit(r, row, block, scale, offset)
        _expand(r, row, scale, offset)
        any_moved |= _move_codes(row, block)
        if not any_moved:
            break
    for i in range(codes.shape[0]):
        codes[i] = np.uint8(row.codes[i])


@njit(parallel=True, cache=True)
def refine_block(values, gradient, hessian, codes, levels, uniform, spread, scale, offset, refit, rounding, rounds):
    """Makes one sweep of coordinate descent over a block of columns. The loss of a row is (Q - W) H (Q - W)^T.

    In each of its rounds, the block's stored scales and offsets move first if `refit`, with the codes fixed. Then each
    code moves in turn. No step raises the loss. All arrays are the block's part of the whole. Values, gradient, codes,
    `spread` and the stored numbers are changed in place.

    values    [R, B], the decoded weights Q
    gradient  [R, B], (Q - W) H
    hessian   [B, B]
    codes     uint8 [R, B]
    levels    [1 or R, K]
    spread    [R, G, B], the sum of level_i H_i over the columns i of each group; of no meaning unless `refit`
    scale, offset   `cpu.Stored`, with one number for each group
    rounding  how values are rounded, a number of `formats.codec.Rounding`
    """
    rows, width = values.shape
    groups = spread.shape[1]
    inverse, summed, offsets = _shared(hessian, groups)
    for r in prange(rows):
        lines, pairs = np.empty((6, width), np.float32), np.zeros((2, 2, groups), np.float32)
        squares = np.empty((2, groups, groups), np.float32)
        block = Block(hessian, inverse, summed, offsets, levels[r % levels.shape[0]], uniform, rounding, refit)
        row = Row(values[r], gradient[r], lines[0], lines[1], lines[2], lines[3], lines[4], lines[5], spread[r],
                  squares[0], squares[1], pairs[0], pairs[1])  # fmt: skip
        # As int64, since the type of `r` itself differs between numba's passes, and all would be compiled twice.
        _refine_row(np.int64(r), row, block, codes[r], scale, offset, rounds)
