"""The solver's inner loops, compiled for the CPU with numba. They run in parallel over rows, which are independent.

`lqexport.solver.solve_cpu` calls them. `lqexport.solver.solve_torch` does the same on any device, and a test checks
that both give the same results. All arrays are float32 and C-contiguous unless stated otherwise. In the shapes, R is
rows, C columns, G groups, B columns of a block, and K levels.

No loop has numba's `fastmath`. With it, the compiler would choose the order of a sum, and its choice depends on what is
inlined and on the processor. To be fast without it, loops compute many sums side by side instead of one sum in parts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from lqexport.formats.codec import Rounding

ZERO, ONE = np.float32(0), np.float32(1)
HALF_STEPS, BFLOAT_STEPS = int(Rounding.HALF_STEPS), int(Rounding.BFLOAT_STEPS)

TILE_ROWS, TILE_COLUMNS = 8, 512
"""The tile size of `table_products`: rows, and columns of H."""


class Stored(NamedTuple):
    """A block's scales or offsets as the file stores them (see `formats.codec.ScaleFormat`). Kernels change them in
    place.

    present   whether the format has this number
    supers    float32 [R, G / span]
    subs      int16 [R, G]
    mantissa, lowest, least, most   the floats that a refit may choose for `supers` (`formats.codec.FloatFormat`)
    step      the distance between the integers
    """

    present: bool
    supers: NDArray[np.float32]
    subs: NDArray[np.int16]
    span: int
    low: int
    high: int
    sign: np.float32
    mantissa: int
    lowest: int
    least: float
    most: float
    step: int


class Form(NamedTuple):
    """The properties of the format that `fit_groups` fits; see there."""

    levels: NDArray[np.float32]
    uniform: bool
    has_offset: bool
    not_positive: bool


class Tries(NamedTuple):
    """N scales and shifts of one group that are tried side by side, which is fast without `fastmath`.

    scale, shift   float32 [N]
    inverse, level   float32 [N], work space
    sums   float32 [3, N], work space
    """

    scale: NDArray[np.float32]
    shift: NDArray[np.float32]
    inverse: NDArray[np.float32]
    level: NDArray[np.float32]
    sums: NDArray[np.float32]


@njit(cache=True, inline="always")
def _nearest(target, levels, uniform):
    """Returns the code of the level nearest to `target`, which is (weight - offset) / scale."""
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
    """Rounds a float64 to the nearest float16, ties to even. Values beyond the largest float16 become the largest."""
    if abs(x) < 2.0**-14:  # subnormal float16 numbers are multiples of 2^-24
        return np.rint(x * 2.0**24) * 2.0**-24
    big = x * (2.0**42 + 1)  # Veltkamp's split: keeps 53 - 42 = 11 bits
    half = big - (big - x)
    return min(max(half, -65504.0), 65504.0)


@njit(cache=True, inline="always")
def _round_bfloat(x):
    """Rounds a float64 to the nearest bfloat16, ties to even. Subnormal and infinite ones are not meant."""
    big = x * (2.0**45 + 1)  # Veltkamp's split: keeps 53 - 45 = 8 bits
    return big - (big - x)


@njit(cache=True, inline="always")
def _round_float(x, stored):
    """Rounds a float64 to the nearest float that a file can store in `stored.supers`, ties to even."""
    exponent = max(np.floor(np.log2(abs(x))), stored.lowest)
    unit = 2.0 ** (exponent - stored.mantissa)
    return min(max(np.rint(x / unit) * unit, stored.least), stored.most)


@njit(cache=True, inline="always")
def _value(scale, level, offset, rounding):
    """Returns the decoded weight scale * level + offset, rounded as `formats.codec.Rounding` says."""
    if rounding == BFLOAT_STEPS:
        product = np.float32(_round_bfloat(np.float64(scale * level)))
        return np.float32(_round_bfloat(np.float64(product + offset)))
    product = np.float32(_round_half(np.float64(scale * level))) if rounding == HALF_STEPS else scale * level
    value = product + offset
    return value if rounding == 0 else np.float32(_round_half(np.float64(value)))


@njit(parallel=True, cache=True)
def feedback_block(weights, upper, scale, offset, levels, uniform, rounding, codes, errors):
    """Quantizes a block's columns one after the other and spreads each error over the block's later columns.

    weights   [R, B] in solve order, changed in place
    upper     [B, B], the block's part of U, where H^-1 = U^T U
    scale, offset   [R, B], for every column
    levels    [1 or R, K]
    rounding  how values are rounded, a number of `formats.codec.Rounding`
    codes     uint8 [R, B], written
    errors    [R, B], written: (w - q) / U_ii, which the caller spreads over later blocks
    """
    width = upper.shape[0]
    for r in prange(weights.shape[0]):
        table = levels[r % levels.shape[0]]
        row = weights[r]
        for i in range(width):
            s, o = scale[r, i], offset[r, i]
            code = _nearest((row[i] - o) / s if s != 0 else np.float32(0), table, uniform)
            error = (row[i] - _value(s, table[code], o, rounding)) / upper[i, i]
            codes[r, i] = code
            errors[r, i] = error
            for j in range(i + 1, width):
                row[j] -= error * upper[i, j]


@njit(cache=True, inline="always")
def _push(gradient, hessian, i, delta):
    """Updates the gradient (Q - W) H after the value of column i changed by `delta`."""
    for j in range(gradient.shape[0]):
        gradient[j] += delta * hessian[i, j]


@njit(cache=True)
def _best_step(direction, work, gradient, hessian, first, last):
    """Returns the step along `direction` (columns first..last) that minimises the loss: minus slope over curvature."""
    steps, products = direction[first:last], work[first:last]
    products[:] = 0
    for i in range(steps.shape[0]):
        if steps[i] != 0:
            row = hessian[first + i, first:last]
            for j in range(i):  # a range from 0 needs no check for negative indices, so numba vectorises the loop
                products[j] += steps[i] * row[j]
    slope, curvature = 0.0, 0.0
    for i in range(steps.shape[0]):
        slope += steps[i] * gradient[first + i]
        curvature += steps[i] * (2 * products[i] + steps[i] * hessian[first + i, first + i])
    return -slope / curvature if curvature > 0 else 0.0


@njit(cache=True, inline="always")
def _move(direction, amount, values, gradient, hessian, first, last):
    """Moves the values of columns first..last by `amount` along `direction`, and updates the gradient."""
    for i in range(first, last):
        change = np.float32(amount * direction[i])
        if change != 0:
            values[i] += change
            _push(gradient, hessian, i, change)


@njit(cache=True, inline="always")
def _refit(stored, r, basis, values, gradient, hessian, group, direction, work):
    """Moves the stored numbers of row r to the best values that the file can hold.

    Moves each float, and then, in two-level formats, each group's integer. The number multiplies `basis`: the levels
    for a scale, ones for an offset. The loss is quadratic in one number, so the best stored value is the one nearest to
    the minimum. A move is made only if it lowers the loss.
    """
    supers, subs = stored.supers[r], stored.subs[r]
    for k in range(supers.shape[0]):
        first, last = k * group * stored.span, (k + 1) * group * stored.span
        for i in range(first, last):
            direction[i] = stored.sign * subs[i // group] * basis[i]
        step = _best_step(direction, work, gradient, hessian, first, last)
        change = _round_float(supers[k] + step, stored) - supers[k]
        if change * (change - 2 * step) < 0:  # the quadratic is lower at `change` than at 0
            supers[k] += np.float32(change)
            _move(direction, change, values, gradient, hessian, first, last)
    if stored.low == stored.high:
        return
    for g in range(subs.shape[0]):
        first, last = g * group, (g + 1) * group
        for i in range(first, last):
            direction[i] = stored.sign * supers[g // stored.span] * basis[i]
        step = _best_step(direction, work, gradient, hessian, first, last)
        best = np.rint(subs[g] + step) if stored.step == 1 else subs[g] + stored.step * np.rint(step / stored.step)
        change = min(max(best, stored.low), stored.high) - subs[g]
        if change * (change - 2 * step) < 0:
            subs[g] += int(change)
            _move(direction, change, values, gradient, hessian, first, last)


@njit(cache=True, inline="always")
def _number(stored, r, group, default):
    """Returns the scale or offset of a row and group, or `default` if the format has no such number."""
    if not stored.present:
        return default
    return stored.sign * stored.supers[r, group // stored.span] * np.float32(stored.subs[r, group])


@njit(cache=True, inline="always")
def _span(low, high, form, cut_low, cut_high):
    """Returns the scale and shift that map the levels onto a group's range, after cutting a share of it at each end."""
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
    """Sets `inverse` to 1 / scale, or to 0 if the scale is 0."""
    for n in range(tries.scale.shape[0]):
        tries.inverse[n] = ONE / tries.scale[n] if tries.scale[n] != 0 else ZERO


@njit(cache=True, inline="always")
def _set_level(x, form, tries):
    """Sets `level` to the level nearest to weight `x` under each try's scale and shift."""
    levels, level, shift, inverse = form.levels, tries.level, tries.shift, tries.inverse
    for n in range(level.shape[0]):
        target = (x - shift[n]) * inverse[n]
        if form.uniform:
            level[n] = min(max(np.rint(target), levels[0]), levels[levels.shape[0] - 1])
        else:
            level[n] = levels[_nearest(target, levels, False)]


@njit(cache=True)
def _refit_tries(x, weight, mean, form, tries):
    """Refits each try's scale and shift by weighted least squares, to the levels nearest under the old ones."""
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
    """Returns the weighted squared error of the group under each try."""
    scale, shift, level, error = tries.scale, tries.shift, tries.level, tries.sums[0]
    error[:] = 0
    _set_inverse(tries)
    for i in range(x.shape[0]):
        _set_level(x[i], form, tries)
        for n in range(level.shape[0]):
            difference = x[i] - scale[n] * level[n] - shift[n]
            error[n] += weight[i] * difference * difference
    return error


@njit(cache=True)
def _search(x, weight, form, cuts, around, best, tries):
    """Tries every range and returns the best: (error, scale, shift, cut_low, cut_high), or `best` if none is better.

    The cuts that are tried are `around` plus `cuts`.
    """
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
    """Returns work space for as many tries as there are cuts."""
    count = cuts.shape[0]
    one, two = np.empty((2, count), np.float32), np.empty((2, count), np.float32)
    return Tries(one[0], one[1], two[0], two[1], np.empty((3, count), np.float32))


@njit(parallel=True, cache=True)
def fit_groups(weights, weight, levels, uniform, has_offset, not_positive, cuts, fine, scale, shift):
    """Searches every group's scale and shift for the least weighted squared error.

    It tries many ranges and then others around the best one. Two weighted least-squares refits follow each range.

    weights   [R, C]
    weight    [G, C / G], the importance of each column; it sums to 1 in a group
    levels    [K]
    uniform   whether the levels are consecutive integers
    has_offset   whether the format has an offset
    not_positive   whether the offset must not be above 0
    cuts, fine   [N, 2], the shares of the range to cut below and above; without an offset, of the largest magnitude
    scale, shift   [R, G], written
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
    """Adds P^T H P of each row to `products`. P [C, K] has a 1 at each column's code and zeros elsewhere.

    A tile of H's columns is summed by code for several rows at once, so H is read once for all of them and the sums
    stay in the cache. H is symmetric, so only the tile's diagonal block and the part below it are read.

    hessian   [C, C]
    codes     uint8 [R, C]
    products  float64 [R, K, K], changed in place
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
