"""The solver's inner loops for formats with a codebook, compiled for the CPU with numba, parallel over rows.

Eight consecutive columns are solved together, by the vectors of 4 or 8 codes that the codebook allows. The loss of
eight values v is v M v^T - 2 b v^T, for a metric M [8, 8] and b [8]. The vector of least loss among all of the codebook
is found for the signs at hand; then signs change where that lowers the loss; and again, until nothing changes. In the
shapes, R is rows, B columns of a block, G groups, N vectors, P first halves of vectors and K levels, as in
`kernels.cpu`. No loop has `fastmath`.

The loss of a vector is the squared length of its levels times a triangular matrix, plus a target. So the first half of
a vector bounds its loss from below. Vectors that share a first half stand together, and are left out together where
that bound is above the best loss. The result is that of trying all.

numba counts the references to each array that a function is given, which takes as long as the search does. So there
are few arrays, and they are passed whole.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from lqexport.kernels.cpu import ONE, ZERO, _number, _push, _refit

EIGHT = 8
HALF = EIGHT // 2
ROUNDS = 4
"""How often vectors and signs of eight columns are changed in turn, at most."""
TWO, INFINITE = np.float32(2), np.float32(np.inf)
MOST, INDEX = np.int64(2**63 - 1), np.int64(2**32 - 1)
"""The largest key, and the bits of a key that are the number of the vector (see `_key`)."""
TARGET, END, SIGN, VALUE, LINEAR, GAIN, CODE, ROWS = range(8, 16)
"""Rows of a row's work space, float32 [15, 8]. The first eight rows are the matrix.

    matrix  [8, 8], upper; halves of vectors of 4 take the rows and columns 0, 1, 4 and 5, others are zero
    TARGET  what is added to a vector times the matrix
    END     the second half of the target, with what the first half of a vector adds to it
    SIGN    1 or -1
    VALUE   the values of the eight columns
    LINEAR  the b of the loss
    GAIN    what the loss changes by if a sign does
    CODE    the codes of the eight columns, without the lift, and not mirrored
"""


class Book(NamedTuple):
    """A codebook as the loops need it (see `formats.codebook.Codebook`).

    vectors  uint8 [N, width], the codes, such that vectors with the same first half follow each other
    halves   float32 [4, P + N], the levels of each first half, then of the second half of each vector; of a lifted
             codebook, without the lift; of vectors of 4, the third and fourth row are zero
    starts   uint64 [P + 1], the column of `halves` from which on vectors begin with each first half; at the end P + N
    levels   float32 [K]
    even     whether the number of minus signs in eight columns must be even
    lift     columns that share a lift; 0 if levels have signs instead
    shift    what a lift adds to the levels, or the lack of one subtracts; 0 if levels have signs instead
    """

    vectors: NDArray[np.uint8]
    halves: NDArray[np.float32]
    starts: NDArray[np.uint64]
    levels: NDArray[np.float32]
    even: bool
    lift: int
    shift: np.float32


class Room(NamedTuple):
    """Work space of a row.

    work    float32 [15, 8], see `ROWS`
    order   uint64 [P + 1], the first halves to look at
    loss    float32 [P + N], of first halves, and of vectors
    """

    work: NDArray[np.float32]
    order: NDArray[np.uint64]
    loss: NDArray[np.float32]


@njit(cache=True)
def _room(book):
    return Room(
        np.zeros((ROWS, EIGHT), np.float32), np.empty(book.starts.shape[0], np.uint64),
        np.empty(book.halves.shape[1], np.float32),
    )  # fmt: skip


@njit(cache=True, inline="always")
def place(i, width):
    """Returns the row and column of the matrix for column i of a vector."""
    return i if width == EIGHT else i + (i & 2)


@njit(cache=True, inline="always")
def _key(loss, n):
    """Returns an integer that orders vectors by their losses, which are not negative, and equal losses by n."""
    return np.int64(np.float32(loss).view(np.int32)) << 32 | np.int64(n)


@njit(cache=True, inline="always")
def _half_losses(halves, start, stop, begin, work, first, target, loss):
    """Sets the losses of halves start .. stop of vectors, and returns the least key of them.

    A loss is `begin`, and the squared length of the half times four rows and columns of the matrix, plus four numbers
    of row `target`. Indices are unsigned, since numba vectorises no loop that must check them for negative ones. The
    least key is that of integers, since without `fastmath` it vectorises no minimum of floats.
    """
    one, two, three, four = first, first + 1, first + 2, first + 3
    m11, m12, m13, m14 = work[one, one], work[one, two], work[one, three], work[one, four]
    m22, m23, m24 = work[two, two], work[two, three], work[two, four]
    m33, m34, m44 = work[three, three], work[three, four], work[four, four]
    t1, t2, t3, t4 = work[target, 0], work[target, 1], work[target, 2], work[target, 3]
    least = MOST
    for n in range(start, stop):
        a, b, c, d = halves[0, n], halves[1, n], halves[2, n], halves[3, n]
        e1, e2 = t1 + a * m11, t2 + a * m12 + b * m22
        e3, e4 = t3 + a * m13 + b * m23 + c * m33, t4 + a * m14 + b * m24 + c * m34 + d * m44
        loss[n] = begin + ((e1 * e1 + e2 * e2) + (e3 * e3 + e4 * e4))
        least = min(least, _key(loss[n], n))
    return least


@njit(cache=True, inline="always")
def _least(halves, starts, work, order, loss):
    """Returns the key of the vector whose loss is least, and the first one of equal ones."""
    count, one = starts[0], np.uint64(1)
    first = np.uint64(_half_losses(halves, np.uint64(0), count, ZERO, work, 0, TARGET, loss) & INDEX)
    best, turn, left = MOST, np.uint64(0), one
    order[0] = first
    while turn < left:
        p = order[turn]
        turn += one
        if _key(loss[p], 0) > best:
            continue
        for i in range(HALF):
            end = work[TARGET, HALF + i]
            for j in range(HALF):
                end += halves[j, p] * work[j, HALF + i]
            work[END, i] = end
        best = min(best, _half_losses(halves, starts[p], starts[p + one], loss[p], work, HALF, END, loss))
        if turn == one and left == one:
            for n in range(count):  # without a branch, which would be hard to predict
                order[left] = n
                left += np.uint64(n != first and _key(loss[n], 0) <= best)
    return best


@njit(cache=True, inline="always")
def _set_problem(metrics, u, part, scale, shift, width, work):
    """Sets matrix and target for the columns of one vector, with the values of the others as they are."""
    first, lifted = part * HALF, scale * shift
    work[TARGET] = ZERO
    for i in range(width):
        at, linear, signed = place(i, width), work[LINEAR, first + i], scale * work[SIGN, first + i]
        if width == HALF:
            for j in range(HALF):
                linear -= metrics[u, 0, first + i, HALF - first + j] * work[VALUE, HALF - first + j]
        for k in range(EIGHT):
            factor, reach = metrics[u, 1 + 2 * part, at, k], metrics[u, 2 + 2 * part, at, k]
            work[at, k] = signed * factor
            work[TARGET, k] += lifted * factor - linear * reach


@njit(cache=True, inline="always")
def _take(key, scale, shift, part, book, work):
    """Sets codes and values of the columns of one vector. Returns whether a code changed."""
    vector, changed = (key & INDEX) - np.int64(book.starts[0]), False
    for i in range(book.vectors.shape[1]):
        column, code = part * HALF + i, book.vectors[vector, i]
        changed |= work[CODE, column] != code
        work[CODE, column] = code
        work[VALUE, column] = scale * (work[SIGN, column] * (book.levels[code] + book.shift) + shift)
    return changed


@njit(cache=True, inline="always")
def _search(book, room):
    """Returns the key of the vector whose loss is least for the matrix and the target at hand."""
    return _least(book.halves, book.starts, room.work, room.order, room.loss)


@njit(cache=True)
def _flip(metrics, u, even, work):
    """Changes the sign, or with `even` the two signs, whose change lowers the loss most. Returns whether it did."""
    best, one, two = ZERO, -1, -1
    for i in range(EIGHT):
        work[GAIN, i] = -work[LINEAR, i]
    for j in range(EIGHT):
        for i in range(EIGHT):
            work[GAIN, i] += metrics[u, 0, j, i] * work[VALUE, j]
    for i in range(EIGHT):
        work[GAIN, i] = work[VALUE, i] * (work[VALUE, i] * metrics[u, 0, i, i] - work[GAIN, i])
    for i in range(EIGHT):
        if not even:
            if work[GAIN, i] < best:
                best, one = work[GAIN, i], i
            continue
        for j in range(i):
            change = work[GAIN, i] + work[GAIN, j] + TWO * work[VALUE, i] * work[VALUE, j] * metrics[u, 0, i, j]
            if change < best:
                best, one, two = change, i, j
    if one < 0:
        return False
    work[VALUE, one], work[SIGN, one] = -work[VALUE, one], -work[SIGN, one]
    if two >= 0:
        work[VALUE, two], work[SIGN, two] = -work[VALUE, two], -work[SIGN, two]
    return True


@njit(cache=True)
def _lift(metrics, u, scale, shift, book, room):
    """Chooses the vector of eight lifted columns, and where they do not share a lift with others, the lift."""
    least, taken = MOST, shift
    for sign in range(-1 if book.lift == EIGHT else 1, 2, 2):
        tried = np.float32(sign) * shift
        _set_problem(metrics, u, 0, scale, tried, EIGHT, room.work)
        key = _search(book, room)
        if key < least:
            least, taken = key, tried
    _take(least, scale, taken, 0, book, room.work)
    return taken


@njit(cache=True)
def _descend(metrics, u, scale, book, room):
    """Changes vectors and signs of eight columns in turn. `room` has b, the signs and the values to begin with."""
    width, work = book.vectors.shape[1], room.work
    settled, parts = 0, EIGHT // width  # so many parts are the best, given the others and the signs
    for step in range(ROUNDS * parts):
        part = step & (parts - 1)
        _set_problem(metrics, u, part, scale, ZERO, width, work)
        settled = 1 if _take(_search(book, room), scale, ZERO, part, book, work) else settled + 1
        if part == parts - 1:
            for _ in range(EIGHT):
                if not _flip(metrics, u, book.even, work):
                    break
                settled = 0
        if settled >= parts:
            break


@njit(cache=True)
def _solve(metrics, u, scale, shift, book, room):
    """Finds codes and values of eight columns. Returns the shift, another one only if the eight have their own lift."""
    if book.lift:
        return _lift(metrics, u, scale, shift, book, room)
    _descend(metrics, u, scale, book, room)
    return shift


@njit(cache=True, inline="always")
def _loss(metrics, u, work):
    """Returns the loss of the values of eight columns."""
    total = ZERO
    for i in range(EIGHT):
        work[GAIN, i] = -TWO * work[LINEAR, i]
    for j in range(EIGHT):
        for i in range(EIGHT):
            work[GAIN, i] += metrics[u, 0, j, i] * work[VALUE, j]
    for i in range(EIGHT):
        total += work[VALUE, i] * work[GAIN, i]
    return total


@njit(cache=True, inline="always")
def _store(codes, first, lifted, book, work):
    """Writes the codes of eight columns."""
    last = book.levels.shape[0] - 1
    for i in range(EIGHT):
        code = np.uint8(work[CODE, i])
        codes[first + i] = code + lifted if book.lift else (code if work[SIGN, i] > 0 else last - code)


@njit(cache=True, inline="always")
def _set_linear(values, first, metrics, u, work):
    """Sets b to eight values times the metric."""
    work[LINEAR] = ZERO
    for j in range(EIGHT):
        for i in range(EIGHT):
            work[LINEAR, i] += metrics[u, 0, j, i] * values[first + j]


@njit(cache=True, inline="always")
def _set_signs(x, weight, first, start, even, lift, work):
    """Sets the signs of eight columns to those of x; if their number must be even, but for the one that costs least."""
    odd, weakest, least = False, 0, INFINITE
    for i in range(EIGHT):
        work[SIGN, i] = -ONE if x[first + i] < 0 and not lift else ONE
        odd ^= x[first + i] < 0
    if even and odd:
        for i in range(EIGHT):
            cost = abs(x[first + i]) * weight[start + i]
            if cost < least:
                weakest, least = i, cost
        work[SIGN, weakest] = -work[SIGN, weakest]


@njit(cache=True, inline="always")
def _choose(x, weight, first, start, scale, shift, book, room):
    """Chooses vectors and signs of eight columns for a metric that is diagonal.

    x       [C], of which columns `first` .. `first + 7` are meant
    weight  the diagonal, from `start` on

    The values are those of the scale 1. Returns the sums of weight * x * value and weight * value^2.
    """
    width, work = book.vectors.shape[1], room.work
    _set_signs(x, weight, first, start, book.even, book.lift, work)
    work[: END + 1] = ZERO
    cross, square = ZERO, ZERO
    for part in range(EIGHT // width):
        for i in range(width):
            column, at = part * HALF + i, place(i, width)
            root = np.sqrt(weight[start + column])
            work[at, at] = scale * work[SIGN, column] * root
            work[TARGET, at] = root * (scale * shift - x[first + column])
        _take(_search(book, room), ONE, shift, part, book, work)
    for i in range(EIGHT):
        cross += weight[start + i] * x[first + i] * work[VALUE, i]
        square += weight[start + i] * work[VALUE, i] * work[VALUE, i]
    return cross, square


@njit(cache=True)
def _products(x, weight, first, start, count, scale, shift, book, room):
    """Returns the sums of weight * x * level and weight * level^2 for the levels nearest to x / scale.

    It takes `count` columns of x from `first` on, and of the weights from `start` on.
    """
    cross, square = ZERO, ZERO
    for at in range(0, count, EIGHT):
        least, one, two = INFINITE, ZERO, ZERO
        for sign in range(1, -2 if book.lift == EIGHT else 0, -2):
            a, b = _choose(x, weight, first + at, start + at, scale, np.float32(sign) * shift, book, room)
            loss = scale * (scale * b - TWO * a)
            if loss < least:
                least, one, two = loss, a, b
        cross += one
        square += two
    return cross, square


@njit(cache=True)
def _shift_of(x, weight, first, scale, book, room):
    """Returns the shift of columns that share one under which the nearest vectors have the least error."""
    above, above_square = _products(x, weight, first, first, book.lift, scale, book.shift, book, room)
    below, below_square = _products(x, weight, first, first, book.lift, scale, -book.shift, book, room)
    lower = scale * (scale * below_square - TWO * below) < scale * (scale * above_square - TWO * above)
    return -book.shift if lower else book.shift


@njit(cache=True, inline="always")
def _spread(row, first, inverse, u, upper, errors, work):
    """Writes the errors of eight columns, and subtracts what they spread from the block's later columns."""
    for i in range(EIGHT):
        error = ZERO
        for j in range(i + 1):
            error += (row[first + j] - work[VALUE, j]) * inverse[u, j, i]
        errors[first + i] = error
    for i in range(EIGHT):
        error = errors[first + i]
        for j in range(first + EIGHT, row.shape[0]):
            row[j] -= error * upper[first + i, j]


@njit(cache=True)
def _feedback_row(row, upper, metrics, weight, inverse, scale, book, codes, errors):
    """Does what `feedback_block` does to one row."""
    room, shift = _room(book), book.shift
    work = room.work
    for u in range(scale.shape[0]):
        first = EIGHT * u
        if book.lift > EIGHT and first % book.lift == 0:
            shift = _shift_of(row, weight, first, scale[u], book, room)
        _set_signs(row, weight, first, first, book.even, book.lift, work)
        _set_linear(row, first, metrics, u, work)
        for i in range(EIGHT):
            work[VALUE, i], work[CODE, i] = row[first + i], -ONE  # no code yet
        taken = _solve(metrics, u, scale[u], shift, book, room)
        _store(codes, first, taken > 0, book, work)
        _spread(row, first, inverse, u, upper, errors, work)


@njit(parallel=True, cache=True)
def feedback_block(weights, upper, metrics, weight, inverse, scale, book, codes, errors):
    """Quantizes a block's columns eight by eight and spreads each error over the block's later columns.

    weights   [R, B] in solve order, changed in place
    upper     [B, B], the block's part of U, where H^-1 = U^T U
    metrics   [B / 8, 1 + 16 / width, 8, 8], of each eight columns: M, which here is the inverse times its transpose;
              then for each vector an upper T, T T^T being its part of M, and the transpose of T's inverse, both in the
              rows and columns of a row's matrix
    weight    [B], the diagonals of the metrics
    inverse   [B / 8, 8, 8], the inverse of each of U's blocks of eight columns on its diagonal
    scale     [R, B / 8], of each eight columns
    codes     uint8 [R, B], written
    errors    [R, B], written: (w - q) times the inverse, which the caller spreads over later blocks
    """
    for r in prange(weights.shape[0]):
        _feedback_row(weights[r], upper, metrics, weight, inverse, scale[r], book, codes[r], errors[r])


@njit(cache=True, inline="always")
def _resume(q, gradient, first, metrics, u, codes, book, work):
    """Sets signs and values of eight columns to the present ones, and b to what makes the gradient that of the loss."""
    last = book.levels.shape[0] - 1
    _set_linear(q, first, metrics, u, work)
    for i in range(EIGHT):
        code = codes[first + i]
        minus = not book.lift and book.levels[code] < 0
        work[SIGN, i], work[CODE, i] = -ONE if minus else ONE, last - code if minus else code
        work[VALUE, i] = q[first + i]
        work[LINEAR, i] -= gradient[first + i]


@njit(cache=True)
def _refine_row(q, gradient, hessian, metrics, codes, r, group, scale, refit, book):
    """Does what `refine_block` does to row r."""
    width, room = q.shape[0], _room(book)
    work = room.work
    if refit:
        direction, spare, basis = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
        for i in range(width):
            basis[i] = book.levels[codes[i]]
        _refit(scale, r, basis, q, gradient, hessian, group, direction, spare)
    for u in range(width // EIGHT):
        first = EIGHT * u
        s = _number(scale, r, first // group, ONE)
        if s == 0:
            continue
        shift = book.shift if book.lift == EIGHT or codes[first] & 1 else -book.shift
        _resume(q, gradient, first, metrics, u, codes, book, work)
        before = _loss(metrics, u, work)
        taken = _solve(metrics, u, s, shift, book, room)
        if _loss(metrics, u, work) >= before:
            continue
        _store(codes, first, taken > 0, book, work)
        for i in range(EIGHT):
            change = work[VALUE, i] - q[first + i]
            if change != 0:
                q[first + i] += change
                _push(gradient, hessian, first + i, change)


@njit(parallel=True, cache=True)
def refine_block(values, gradient, hessian, metrics, codes, group, scale, refit, book):
    """Makes one round of coordinate descent over a block of columns, as `kernels.refine.refine_block` does.

    Codes change eight at a time. `metrics` are those of `feedback_block`, of the Hessian's blocks on its diagonal.
    """
    for r in prange(values.shape[0]):
        # As int64, since the type of `r` itself differs between numba's passes, and all would be compiled twice.
        _refine_row(values[r], gradient[r], hessian, metrics, codes[r], np.int64(r), group, scale, refit, book)


@njit(cache=True)
def _fit_group(x, weight, start, count, cuts, book, room):
    """Returns the best scale of a group and the sum of weight * level^2 under it; zeros for a group of zeros."""
    largest, gain, scale, square = ZERO, ZERO, ZERO, ZERO
    for i in range(start, start + count):
        largest = max(largest, abs(x[i]))
    for t in range(cuts.shape[0] + 2):
        tried = (ONE - cuts[t]) * largest / book.levels[-1] if t < cuts.shape[0] else scale
        for sign in range(-1 if book.lift > EIGHT else 1, 2, 2):
            if tried == 0:
                continue
            cross, total = _products(x, weight, start, start, count, tried, np.float32(sign) * book.shift, book, room)
            if cross > 0 and cross * cross > gain * total:
                gain, scale, square = cross * cross / total, cross / total, total
    return scale, square


@njit(parallel=True, cache=True)
def fit_groups(weights, weight, cuts, book, scale, square):
    """Searches every group's scale for the least weighted squared error.

    It tries some ranges, takes for each of them the best scale of the levels that are nearest, and goes on twice from
    the best one.

    weights   [R, C]
    weight    [C], the importance of each column; it sums to 1 in a group
    cuts      [T], shares of the largest magnitude that the levels do not reach
    scale     [R, G], written
    square    [R, G], written: the sum of weight * level^2, by which an error of the scale counts
    """
    groups = scale.shape[1]
    width = weight.shape[0] // groups
    for r in prange(weights.shape[0]):
        room = _room(book)
        for k in range(groups):
            scale[r, k], square[r, k] = _fit_group(weights[r], weight, k * width, width, cuts, book, room)
