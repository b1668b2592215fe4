"""The solver's inner loops for formats with a codebook, compiled for the CPU with numba, parallel over rows.

Eight consecutive columns are solved together, by the vectors of 4 or 8 codes that the codebook allows. The loss of
eight values v is v M v^T - 2 b v^T, for a metric M [8, 8] and b [8]. The vector of least loss among all of the codebook
is found for the signs at hand; then signs change where that lowers the loss; and again, until nothing changes. In the
shapes, R is rows, B columns of a block, G groups, N vectors and K levels, as in `kernels.cpu`. No loop has `fastmath`.

The loss of all vectors is a sum of few terms over rows of a table, `Book.features`, that the vectors share. So it is
computed for many vectors side by side.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from lqexport.kernels.cpu import ONE, ZERO, _number, _push, _refit

EIGHT = 8
ROUNDS = 4
"""How often vectors and signs of eight columns are changed in turn, at most."""


class Book(NamedTuple):
    """A codebook as the loops need it (see `formats.codebook.Codebook`).

    vectors   uint8 [N, width], the codes
    base      float32 [N, width], the levels of the codes; of a lifted codebook, without the lift
    features  float32 [F, N]: the base's levels, their squares, their products in pairs, and zeros up to a multiple of 4
    levels    float32 [K]
    even      whether the number of minus signs in eight columns must be even
    lift      columns that share a lift; 0 if levels have signs instead
    shift     what a lift adds to the base, or the lack of one subtracts; 0 if levels have signs instead
    """

    vectors: NDArray[np.uint8]
    base: NDArray[np.float32]
    features: NDArray[np.float32]
    levels: NDArray[np.float32]
    even: bool
    lift: int
    shift: np.float32


class Room(NamedTuple):
    """Work space of a row.

    loss    float32 [N]
    factor  float32 [F]
    sign    float32 [8], 1 or -1
    value   float32 [8], the values of the eight columns
    linear  float32 [8], the b of the loss
    vector  int64 [8 / width], the vectors of the eight columns
    """

    loss: NDArray[np.float32]
    factor: NDArray[np.float32]
    sign: NDArray[np.float32]
    value: NDArray[np.float32]
    linear: NDArray[np.float32]
    vector: NDArray[np.int64]


@njit(cache=True)
def _room(book):
    eights = np.empty((3, EIGHT), np.float32)
    return Room(
        np.empty(book.features.shape[1], np.float32), np.zeros(book.features.shape[0], np.float32), eights[0],
        eights[1], eights[2], np.zeros(EIGHT // book.vectors.shape[1], np.int64),
    )  # fmt: skip


@njit(cache=True)
def _least(features, factor, loss):
    """Returns the vector of least loss: the sum of its features times their factors."""
    count = loss.shape[0]
    for n in range(count):
        loss[n] = ZERO
    for k in range(0, factor.shape[0], 4):
        a, b, c, d = factor[k], factor[k + 1], factor[k + 2], factor[k + 3]
        first, second, third, fourth = features[k], features[k + 1], features[k + 2], features[k + 3]
        for n in range(count):
            loss[n] += (a * first[n] + b * second[n]) + (c * third[n] + d * fourth[n])
    best = 0
    for n in range(count):
        if loss[n] < loss[best]:
            best = n
    return best


@njit(cache=True)
def _set_factors(metric, scale, shift, part, book, room):
    """Sets the factors of the features for the columns of one vector, with the values of the others as they are."""
    width = book.vectors.shape[1]
    first, square, k = part * width, scale * scale, 2 * width
    for i in range(width):
        column, total, other = first + i, ZERO, room.linear[first + i]
        for j in range(EIGHT):
            if first <= j < first + width:
                total += metric[column, j]
            else:
                other -= metric[column, j] * room.value[j]
        room.factor[i] = 2 * room.sign[column] * (square * shift * total - scale * other)
        room.factor[width + i] = square * metric[column, column]
        for j in range(i):
            room.factor[k] = 2 * square * room.sign[column] * room.sign[first + j] * metric[column, first + j]
            k += 1


@njit(cache=True)
def _take(scale, shift, part, book, room):
    """Sets the values of the columns of one vector."""
    width = book.vectors.shape[1]
    for i in range(width):
        column = part * width + i
        room.value[column] = scale * (room.sign[column] * book.base[room.vector[part], i] + shift)


@njit(cache=True)
def _flip(metric, even, room):
    """Changes the sign, or with `even` the two signs, whose change lowers the loss most. Returns whether it did."""
    value, best, one, two = room.value, ZERO, -1, -1
    gain, slope = room.factor, ZERO  # the factors are not needed any more
    for i in range(EIGHT):
        slope = -room.linear[i]
        for j in range(EIGHT):
            slope += metric[i, j] * value[j]
        gain[i] = value[i] * (value[i] * metric[i, i] - slope)
    for i in range(EIGHT):
        if not even:
            if gain[i] < best:
                best, one = gain[i], i
            continue
        for j in range(i):
            change = gain[i] + gain[j] + 2 * value[i] * value[j] * metric[i, j]
            if change < best:
                best, one, two = change, i, j
    if one < 0:
        return False
    value[one], room.sign[one] = -value[one], -room.sign[one]
    if two >= 0:
        value[two], room.sign[two] = -value[two], -room.sign[two]
    return True


@njit(cache=True)
def _descend(metric, scale, shift, book, room):
    """Changes vectors and signs of eight columns in turn. `room` has b, the signs and the values to begin with."""
    for turn in range(ROUNDS):
        changed = turn == 0
        for part in range(room.vector.shape[0]):
            _set_factors(metric, scale, shift, part, book, room)
            best = _least(book.features, room.factor, room.loss)
            changed |= best != room.vector[part]
            room.vector[part] = best
            _take(scale, shift, part, book, room)
        if not changed:
            return
        if shift != 0 or not _flip(metric, book.even, room):
            if room.vector.shape[0] == 1:
                return
            continue
        for _ in range(EIGHT):
            if not _flip(metric, book.even, room):
                break


@njit(cache=True)
def _loss(metric, room):
    """Returns the loss of the values of eight columns."""
    total = ZERO
    for i in range(EIGHT):
        product = -2 * room.linear[i]
        for j in range(EIGHT):
            product += metric[i, j] * room.value[j]
        total += room.value[i] * product
    return total


@njit(cache=True)
def _store(codes, lifted, book, room):
    """Writes the codes of eight columns."""
    width, last = book.vectors.shape[1], book.levels.shape[0] - 1
    for i in range(EIGHT):
        code = book.vectors[room.vector[i // width], i % width]
        codes[i] = code + lifted if book.lift else (code if room.sign[i] > 0 else last - code)


@njit(cache=True)
def _begin(target, metric, book, room):
    """Sets signs and values of eight columns to the target's, and b to the target times the metric."""
    odd, weakest, least = False, 0, np.float32(np.inf)
    for i in range(EIGHT):
        room.value[i] = target[i]
        room.sign[i] = -ONE if target[i] < 0 and not book.lift else ONE
        odd ^= target[i] < 0
        total = ZERO
        for j in range(EIGHT):
            total += metric[i, j] * target[j]
        room.linear[i] = total
        cost = abs(target[i]) * metric[i, i]
        if cost < least:
            weakest, least = i, cost
    if book.even and odd:
        room.sign[weakest] = -room.sign[weakest]


@njit(cache=True)
def _choose(x, weight, scale, shift, book, room):
    """Chooses vectors and signs of eight columns x for a metric that is diagonal: the weights [8]."""
    width = book.vectors.shape[1]
    odd, weakest, least = False, 0, np.float32(np.inf)
    for i in range(EIGHT):
        room.sign[i] = -ONE if shift == 0 and x[i] < 0 else ONE
        odd ^= x[i] < 0
        if abs(x[i]) * weight[i] < least:
            weakest, least = i, abs(x[i]) * weight[i]
    if book.even and odd:
        room.sign[weakest] = -room.sign[weakest]
    for part in range(room.vector.shape[0]):
        for i in range(width):
            column = part * width + i
            room.factor[i] = -2 * scale * weight[column] * room.sign[column] * (x[column] - scale * shift)
            room.factor[width + i] = scale * scale * weight[column]
        room.vector[part] = _least(book.features, room.factor[: 2 * width], room.loss)
        _take(ONE, shift, part, book, room)


@njit(cache=True)
def _shift_of(x, weight, scale, book, room):
    """Returns the shift of some columns under which the nearest vectors have the least error: 0 without a lift."""
    chosen, least = book.shift, np.float32(np.inf)
    for sign in range(-1, 2, 2):
        shift, loss = np.float32(sign) * book.shift, ZERO
        if book.lift:
            for first in range(0, x.shape[0], EIGHT):
                _choose(x[first : first + EIGHT], weight[first : first + EIGHT], scale, shift, book, room)
                for i in range(EIGHT):
                    difference = x[first + i] - scale * room.value[i]
                    loss += weight[first + i] * difference * difference
        if loss < least:
            chosen, least = shift, loss
    return chosen


@njit(cache=True)
def _spread(row, first, inverse, upper, errors, room):
    """Writes the errors of eight columns, and subtracts what they spread from the block's later columns."""
    for i in range(EIGHT):
        error = ZERO
        for j in range(i + 1):
            error += (row[first + j] - room.value[j]) * inverse[j, i]
        errors[first + i] = error
    for i in range(EIGHT):
        error = errors[first + i]
        for j in range(first + EIGHT, row.shape[0]):
            row[j] -= error * upper[first + i, j]


@njit(cache=True)
def _feedback_row(row, upper, metric, weight, inverse, scale, book, codes, errors):
    """Does what `feedback_block` does to one row."""
    room, shift = _room(book), ZERO
    for u in range(metric.shape[0]):
        first = EIGHT * u
        eight, run = slice(first, first + EIGHT), slice(first, first + max(EIGHT, book.lift))
        if book.lift and first % book.lift == 0:
            shift = _shift_of(row[run], weight[run], scale[u], book, room)
        _begin(row[eight], metric[u], book, room)
        _descend(metric[u], scale[u], shift, book, room)
        _store(codes[eight], shift > 0, book, room)
        _spread(row, first, inverse[u], upper, errors, room)


@njit(parallel=True, cache=True)
def feedback_block(weights, upper, metric, weight, inverse, scale, book, codes, errors):
    """Quantizes a block's columns eight by eight and spreads each error over the block's later columns.

    weights   [R, B] in solve order, changed in place
    upper     [B, B], the block's part of U, where H^-1 = U^T U
    metric    [B / 8, 8, 8], the inverse times its transpose
    weight    [B], the diagonals of the metrics
    inverse   [B / 8, 8, 8], the inverse of each of U's blocks of eight columns on its diagonal
    scale     [R, B / 8], of each eight columns
    codes     uint8 [R, B], written
    errors    [R, B], written: (w - q) times the inverse, which the caller spreads over later blocks
    """
    for r in prange(weights.shape[0]):
        _feedback_row(weights[r], upper, metric, weight, inverse, scale[r], book, codes[r], errors[r])


@njit(cache=True)
def _resume(q, gradient, metric, codes, book, room):
    """Sets signs and values of eight columns to the present ones, and b to what makes the gradient that of the loss."""
    for i in range(EIGHT):
        room.value[i] = q[i]
        room.sign[i] = -ONE if not book.lift and book.levels[codes[i]] < 0 else ONE
        total = -gradient[i]
        for j in range(EIGHT):
            total += metric[i, j] * q[j]
        room.linear[i] = total


@njit(cache=True)
def _refine_row(q, gradient, hessian, codes, r, group, scale, refit, book):
    """Does what `refine_block` does to row r."""
    width, room = q.shape[0], _room(book)
    if refit:
        direction, work, basis = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
        for i in range(width):
            basis[i] = book.levels[codes[i]]
        _refit(scale, r, basis, q, gradient, hessian, group, direction, work)
    for first in range(0, width, EIGHT):
        s, eight = _number(scale, r, first // group, ONE), slice(first, first + EIGHT)
        if s == 0:
            continue
        metric, lifted = hessian[eight, eight], codes[first] & 1
        for other in range(2 if book.lift == EIGHT else 1):
            _resume(q[eight], gradient[eight], metric, codes[eight], book, room)
            before, up = _loss(metric, room), bool(lifted) != bool(other)
            _descend(metric, s, book.shift if up else -book.shift, book, room)
            if _loss(metric, room) >= before:
                continue
            _store(codes[eight], up, book, room)
            for i in range(EIGHT):
                change = room.value[i] - q[first + i]
                if change != 0:
                    q[first + i] += change
                    _push(gradient, hessian, first + i, change)


@njit(parallel=True, cache=True)
def refine_block(values, gradient, hessian, codes, group, scale, refit, book):
    """Makes one round of coordinate descent over a block of columns, as `kernels.refine.refine_block` does.

    Codes change eight at a time.
    """
    for r in prange(values.shape[0]):
        _refine_row(values[r], gradient[r], hessian, codes[r], r, group, scale, refit, book)


@njit(cache=True)
def _products(x, weight, scale, shift, book, room):
    """Returns the sums of weight * x * level and weight * level^2 over a group, for the levels nearest to x / scale."""
    cross, square = ZERO, ZERO
    for first in range(0, x.shape[0], EIGHT):
        part, part_weight = x[first : first + EIGHT], weight[first : first + EIGHT]
        if book.lift == EIGHT:
            shift = _shift_of(part, part_weight, scale, book, room)
        _choose(part, part_weight, scale, shift, book, room)
        for i in range(EIGHT):
            cross += part_weight[i] * part[i] * room.value[i]
            square += part_weight[i] * room.value[i] * room.value[i]
    return cross, square


@njit(cache=True)
def _fit_group(x, weight, cuts, book, room):
    """Returns the best scale of a group and the sum of weight * level^2 under it; zeros for a group of zeros."""
    largest, gain, scale, square = ZERO, ZERO, ZERO, ZERO
    for i in range(x.shape[0]):
        largest = max(largest, abs(x[i]))
    for t in range(cuts.shape[0] + 2):
        tried = (ONE - cuts[t]) * largest / book.levels[-1] if t < cuts.shape[0] else scale
        for sign in range(-1 if book.lift > EIGHT else 1, 2, 2):
            if tried == 0:
                continue
            cross, total = _products(x, weight, tried, np.float32(sign) * book.shift, book, room)
            if cross > 0 and cross * cross > gain * total:
                gain, scale, square = cross * cross / total, cross / total, total
    return scale, square


@njit(parallel=True, cache=True)
def fit_groups(weights, weight, cuts, book, scale, square):
    """Searches every group's scale for the least weighted squared error.

    It tries some ranges, takes for each of them the best scale of the levels that are nearest, and goes on twice from
    the best one.

    weights   [R, C]
    weight    [G, C / G], the importance of each column; it sums to 1 in a group
    cuts      [T], shares of the largest magnitude that the levels do not reach
    scale     [R, G], written
    square    [R, G], written: the sum of weight * level^2, by which an error of the scale counts
    """
    groups, width = weight.shape
    for r in prange(weights.shape[0]):
        room = _room(book)
        for k in range(groups):
            part = weights[r, k * width : (k + 1) * width]
            scale[r, k], square[r, k] = _fit_group(part, weight[k], cuts, book, room)
