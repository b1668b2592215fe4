"""The solver's inner loops, compiled for the CPU with numba: parallel over rows, which are independent.

`lqexport.solver.solve_cpu` calls these; `lqexport.solver.solve_torch` does the same on any device, and a test holds the two equal.
All arrays are float32 and C-contiguous unless said otherwise. R rows, C columns, G groups, K levels.

None of the loops has numba's `fastmath`: how a sum is ordered would be the compiler's choice, which depends on what is
inlined where, and on the processor. So what is summed fast is many sums side by side, not one in many parts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

ZERO, ONE = np.float32(0), np.float32(1)

TILE_ROWS, TILE_COLUMNS = 8, 512
"""Of `table_products`."""


class Stored(NamedTuple):
    """A block's scales or offsets as the file stores them (see `formats.codec.ScaleFormat`), changed in place.

    supers float32 [R, G / span], each value a float16;  subs int16 [R, G];  absent where the format has no such number
    """

    present: bool
    supers: NDArray[np.float32]
    subs: NDArray[np.int16]
    span: int
    low: int
    high: int
    sign: np.float32
    power: bool


class Form(NamedTuple):
    """What `fit_groups` fits to."""

    levels: NDArray[np.float32]
    uniform: bool
    has_offset: bool
    not_positive: bool


class Tries(NamedTuple):
    """Scales and shifts of one group that are tried side by side, so that they are fast without `fastmath`, and work
    space: float32 [N] each, sums [3, N]."""

    scale: NDArray[np.float32]
    shift: NDArray[np.float32]
    inverse: NDArray[np.float32]
    level: NDArray[np.float32]
    sums: NDArray[np.float32]


@njit(cache=True, inline="always")
def _nearest(target, levels, uniform):
    """Code of the level nearest to `target`, which is a weight less its offset, over its scale."""
    count = levels.shape[0]
    if uniform:
        code = np.rint(target - levels[0])
        return int(min(max(code, 0.0), count - 1.0))
    code = 0
    for k in range(count - 1):
        code += target > 0.5 * (levels[k] + levels[k + 1])
    return code


@njit(cache=True, inline="always")
def _round_half(x):
    """A float64 rounded to the nearest float16, ties to even, saturating at the largest."""
    if abs(x) < 2.0**-14:  # subnormal halves are multiples of 2^-24
        return np.rint(x * 2.0**24) * 2.0**-24
    big = x * (2.0**42 + 1)  # Veltkamp's split: keeps 53 - 42 = 11 bits
    half = big - (big - x)
    return min(max(half, -65504.0), 65504.0)


@njit(cache=True, inline="always")
def _round_power(x):
    """A float64 rounded to the nearest power of two that a float16 holds; below the smallest, that."""
    if x <= 2.0**-24:
        return 2.0**-24
    below = 2.0 ** np.floor(np.log2(x))
    return min(below if x < 1.5 * below else 2 * below, 2.0**15)


@njit(cache=True, inline="always")
def _value(scale, level, offset, half):
    """The weight that the file's numbers mean; `half`: rounded to float16."""
    value = scale * level + offset
    return np.float32(_round_half(np.float64(value))) if half else value


@njit(parallel=True, cache=True)
def feedback_block(weights, factor, scale, offset, levels, uniform, half, codes, errors):
    """Quantize the columns of one block in turn, spreading each error over the columns of the block that follow.

    weights   [R, B] in solve order, changed in place
    factor    [B, B] the block's part of U, where H^-1 = U^T U
    scale, offset   [R, B] of each column;  levels [1 or R, K];  half   whether values are rounded to float16
    codes     uint8 [R, B], written;  errors [R, B] (w - q) / U_ii, written: the caller spreads them over later blocks
    """
    width = factor.shape[0]
    for r in prange(weights.shape[0]):
        table = levels[r % levels.shape[0]]
        row = weights[r]
        for i in range(width):
            s, o = scale[r, i], offset[r, i]
            code = _nearest((row[i] - o) / s if s != 0 else np.float32(0), table, uniform)
            error = (row[i] - _value(s, table[code], o, half)) / factor[i, i]
            codes[r, i] = code
            errors[r, i] = error
            for j in range(i + 1, width):
                row[j] -= error * factor[i, j]


@njit(cache=True, inline="always")
def _push(gradient, hessian, i, delta):
    for j in range(gradient.shape[0]):
        gradient[j] += delta * hessian[i, j]


@njit(cache=True)
def _best_step(direction, room, gradient, hessian, first, last):
    """The step along `direction` (columns first..last) that minimises the loss: minus slope over curvature."""
    part, along = direction[first:last], room[first:last]
    along[:] = 0
    for i in range(part.shape[0]):
        if part[i] != 0:
            row = hessian[first + i, first:last]
            for j in range(i):  # from 0: numba drops the check for negative indices, and it vectorises
                along[j] += part[i] * row[j]
    slope, curvature = 0.0, 0.0
    for i in range(part.shape[0]):
        slope += part[i] * gradient[first + i]
        curvature += part[i] * (2 * along[i] + part[i] * hessian[first + i, first + i])
    return -slope / curvature if curvature > 0 else 0.0


@njit(cache=True, inline="always")
def _move(direction, amount, values, gradient, hessian, first, last):
    for i in range(first, last):
        change = np.float32(amount * direction[i])
        if change != 0:
            values[i] += change
            _push(gradient, hessian, i, change)


@njit(cache=True, inline="always")
def _refit(stored, r, basis, values, gradient, hessian, group, direction, room):
    """Move each float16 of row r, then, in two-level formats, each group's integer, to the best that the file can hold.

    `basis` is what the number multiplies: the levels for a scale, ones for an offset. Along one number the loss is a
    quadratic, so its best stored value is the one nearest to the minimum; a move is taken only if it lowers the loss.
    """
    supers, subs = stored.supers[r], stored.subs[r]
    for k in range(supers.shape[0]):
        first, last = k * group * stored.span, (k + 1) * group * stored.span
        for i in range(first, last):
            direction[i] = stored.sign * subs[i // group] * basis[i]
        step = _best_step(direction, room, gradient, hessian, first, last)
        best = supers[k] + step
        change = (_round_power(best) if stored.power else _round_half(best)) - supers[k]
        if change * (change - 2 * step) < 0:  # the quadratic is lower at `change` than at 0
            supers[k] += np.float32(change)
            _move(direction, change, values, gradient, hessian, first, last)
    if stored.low == stored.high:
        return
    for g in range(subs.shape[0]):
        first, last = g * group, (g + 1) * group
        for i in range(first, last):
            direction[i] = stored.sign * supers[g // stored.span] * basis[i]
        step = _best_step(direction, room, gradient, hessian, first, last)
        change = min(max(np.rint(subs[g] + step), stored.low), stored.high) - subs[g]
        if change * (change - 2 * step) < 0:
            subs[g] += int(change)
            _move(direction, change, values, gradient, hessian, first, last)


@njit(cache=True, inline="always")
def _number(stored, r, group, default):
    if not stored.present:
        return default
    return stored.sign * stored.supers[r, group // stored.span] * np.float32(stored.subs[r, group])


@njit(parallel=True, cache=True)
def refine_block(values, gradient, hessian, codes, levels, uniform, group, scale, offset, refit, half):
    """One sweep of coordinate descent over one block of columns, for the loss (Q - W) H (Q - W)^T of each row.

    Where `refit`, first the block's stored scales and offsets with the codes fixed; then each code in turn. No step
    raises the loss. All arrays are this block's part, changed in place:

    values    [R, B] decoded weights Q;  gradient [R, B] (Q - W) H;  hessian [B, B];  codes uint8 [R, B]
    scale, offset   `Stored`, one number per `group` columns;  half   whether values are rounded to float16
    """
    rows, width = values.shape
    for r in prange(rows):
        table = levels[r % levels.shape[0]]
        q, g = values[r], gradient[r]
        direction, room, basis = np.empty(width, np.float32), np.empty(width, np.float32), np.ones(width, np.float32)
        if refit and offset.present:
            _refit(offset, r, basis, q, g, hessian, group, direction, room)
        if refit and scale.present:
            for i in range(width):
                basis[i] = table[codes[r, i]]
            _refit(scale, r, basis, q, g, hessian, group, direction, room)
        for i in range(width):
            s = _number(scale, r, i // group, np.float32(1))
            o = _number(offset, r, i // group, np.float32(0))
            if s == 0 or hessian[i, i] <= 0:
                continue
            code = _nearest((q[i] - g[i] / hessian[i, i] - o) / s, table, uniform)
            if code != codes[r, i]:
                change = _value(s, table[code], o, half) - q[i]
                if half and change * (change + 2 * g[i] / hessian[i, i]) >= 0:  # of two rounded values, the farther
                    continue
                codes[r, i] = code
                q[i] += change
                _push(g, hessian, i, change)


@njit(cache=True, inline="always")
def _span(low, high, form, cut_low, cut_high):
    """Scale and shift that map the levels onto a group's range, less a share of it at each end."""
    first, last = form.levels[0], form.levels[form.levels.shape[0] - 1]
    if not form.has_offset:
        return (ONE - cut_low) * (low if -low >= high else high) / first, ZERO
    if form.not_positive:
        low, high = min(low, ZERO), max(high, ZERO)
    low, high = low + cut_low * (high - low), high - cut_high * (high - low)
    scale = (high - low) / (last - first)
    return scale, low - scale * first


@njit(cache=True, inline="always")
def _set_inverse(tries):
    for n in range(tries.scale.shape[0]):
        tries.inverse[n] = ONE / tries.scale[n] if tries.scale[n] != 0 else ZERO


@njit(cache=True, inline="always")
def _set_level(x, form, tries):
    """The level that is nearest to a weight in each try."""
    levels, level, shift, inverse = form.levels, tries.level, tries.shift, tries.inverse
    for n in range(level.shape[0]):
        target = (x - shift[n]) * inverse[n]
        if form.uniform:
            level[n] = min(max(np.rint(target), levels[0]), levels[levels.shape[0] - 1])
        else:
            level[n] = levels[_nearest(target, levels, False)]


@njit(cache=True)
def _refit_tries(x, weight, mean, form, tries):
    """Weighted least squares for scale and shift, each weight's level the one nearest under the given ones."""
    scale, shift, level = tries.scale, tries.shift, tries.level
    square, cross, mean_level = tries.sums[0], tries.sums[1], tries.sums[2]
    tries.sums[:] = 0
    _set_inverse(tries)
    for i in range(x.shape[0]):
        _set_level(x[i], form, tries)
        for n in range(level.shape[0]):
            square[n] += weight[i] * level[n] * level[n]
        for n in range(level.shape[0]):
            cross[n] += weight[i] * x[i] * level[n]
        for n in range(level.shape[0]):
            mean_level[n] += weight[i] * level[n]
    for n in range(level.shape[0]):
        alone = cross[n] / square[n] if square[n] > 0 else scale[n]
        variance = square[n] - mean_level[n] * mean_level[n]
        if variance > np.float32(1e-12):
            scale[n] = (cross[n] - mean_level[n] * mean) / variance
        shift[n] = mean - scale[n] * mean_level[n]
        if not form.has_offset or (form.not_positive and shift[n] > 0):
            scale[n], shift[n] = alone, ZERO


@njit(cache=True)
def _errors(x, weight, form, tries):
    scale, shift, level, error = tries.scale, tries.shift, tries.level, tries.sums[0]
    error[:] = 0
    _set_inverse(tries)
    for i in range(x.shape[0]):
        _set_level(x[i], form, tries)
        for n in range(level.shape[0]):
            off = x[i] - scale[n] * level[n] - shift[n]
            error[n] += weight[i] * off * off
    return error


@njit(cache=True)
def _search(x, weight, form, cuts, around, best, tries):
    """Try every range; best = (error, scale, shift, cut_low, cut_high) is replaced where one is better."""
    low, high, mean = x[0], x[0], ZERO
    for i in range(x.shape[0]):
        low, high = min(low, x[i]), max(high, x[i])
        mean += weight[i] * x[i]
    for n in range(cuts.shape[0]):
        tries.scale[n], tries.shift[n] = _span(low, high, form, around[0] + cuts[n, 0], around[1] + cuts[n, 1])
    for _ in range(2):
        _refit_tries(x, weight, mean, form, tries)
    error = _errors(x, weight, form, tries)
    for n in range(cuts.shape[0]):
        if error[n] < best[0]:
            best = (error[n], tries.scale[n], tries.shift[n], around[0] + cuts[n, 0], around[1] + cuts[n, 1])
    return best


@njit(cache=True, inline="always")
def _room_for(cuts):
    count = cuts.shape[0]
    one, two = np.empty((2, count), np.float32), np.empty((2, count), np.float32)
    return Tries(one[0], one[1], two[0], two[1], np.empty((3, count), np.float32))


@njit(parallel=True, cache=True)
def fit_groups(weights, weight, levels, uniform, has_offset, not_positive, cuts, fine, scale, shift):
    """Scale and shift of every group with the least weighted squared error found: a search over ranges, then another
    around the best one, each range followed by two weighted least-squares refits.

    weights [R, C];  weight [G, C / G], sum 1 in a group;  levels [K]
    has_offset   whether the format has one;  not_positive   whether it must not be above 0
    cuts, fine [N, 2]   shares of the range to leave out below and above (without offset: of the largest magnitude)
    scale, shift [R, G], written
    """
    groups, width = weight.shape
    for r in prange(weights.shape[0]):
        form, tries, fine_tries = Form(levels, uniform, has_offset, not_positive), _room_for(cuts), _room_for(fine)
        for k in range(groups):
            x, w = weights[r, k * width : (k + 1) * width], weight[k]
            best = (np.float32(np.inf), ZERO, ZERO, ZERO, ZERO)
            best = _search(x, w, form, cuts, (ZERO, ZERO), best, tries)
            best = _search(x, w, form, fine, best[3:], best, fine_tries)
            scale[r, k], shift[r, k] = best[1], best[2]


@njit(cache=True, parallel=True)
def table_products(hessian, codes, products):
    """P^T H P of each row, with P [C, K] the row's codes as indicators; added to float64 products [R, K, K].

    codes uint8 [R, C]. A tile of H's columns is summed by code for a few rows together, so that H is read once for
    them and the sums stay in the cache. What H has above a tile it has beside it, since it is symmetric.
    """
    rows, columns = codes.shape
    count = products.shape[1]
    for tile in prange((rows + TILE_ROWS - 1) // TILE_ROWS):
        first = tile * TILE_ROWS
        held = min(TILE_ROWS, rows - first)
        sums = np.empty((TILE_ROWS, count, TILE_COLUMNS), np.float32)
        for start in range(0, columns, TILE_COLUMNS):
            width = min(TILE_COLUMNS, columns - start)
            for below in range(2):
                sums[:] = 0
                for i in range(start + width, columns) if below else range(start, start + width):
                    line = hessian[i, start : start + width]
                    for r in range(held):
                        total = sums[r, codes[first + r, i]]
                        for j in range(width):
                            total[j] += line[j]
                for r in range(held):
                    for k in range(count):
                        for j in range(width):
                            column = codes[first + r, start + j]
                            products[first + r, k, column] += sums[r, k, j]
                            if below:
                                products[first + r, column, k] += sums[r, k, j]
