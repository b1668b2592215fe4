"""Optimal Brain Quantization, compiled for the CPU with numba: each row in an order of its own, rows in parallel.

At every step a row rounds, of the columns that are left, the one where that costs least, (w_i - q_i)^2 / [H^-1]_ii,
spreads the error over the others, and takes the column out of H^-1. A weight that has left the grid is rounded at once,
the farthest first, while there are columns to take its error (Frantar and Alistarh 2022, arXiv 2208.11580, section 5).

Taking columns out one after the other is a Cholesky factorization of H^-1 in the row's order: with V the columns of the
factor so far, what remains is H^-1 - V V^T. So H^-1 stays as it is, shared by all rows, and a step needs of what
remains the diagonal and one column, a product with V: n^3 / 6 multiplications for n columns, and only V is written.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

LEAST = np.float32(1e-6)
"""Of a diagonal of H^-1 is left at least this share: rounding must not make it negative."""


@njit(cache=True, inline="always")
def _nearest_from(code, weight, levels):
    """Code of the level nearest to a weight, found by steps from a code that was near: few weights move far."""
    while code + 1 < levels.shape[0] and weight > 0.5 * (levels[code] + levels[code + 1]):
        code += 1
    while code > 0 and weight <= 0.5 * (levels[code - 1] + levels[code]):
        code -= 1
    return code


@njit(cache=True, inline="always")
def _cost(weight, code, levels, diagonal):
    """What rounding a weight adds to the loss; below zero, lower the farther, where it is off the grid by more than
    half of the grid's last step."""
    error, last = weight - levels[code], levels.shape[0] - 1
    below, above = 0.5 * (levels[0] - levels[1]), 0.5 * (levels[last] - levels[last - 1])
    if (code == 0 and error < below) or (code == last and error > above):
        return -error * error
    return error * error / diagonal


@njit(cache=True)
def _solve_row(weights, inverse, levels, codes, factor):
    """Codes of one row. weights [C] change in place;  factor [C, C] is work space, line s for V's entries of step s.

    What is left of the row is kept together at the front: of the places 0, 1, ..., `left` says which columns they are.
    So V's entries of a step are a difference of whole lines, each sum in the order of the steps.
    """
    columns = weights.shape[0]
    left, diagonal, entries = np.arange(columns), np.diag(inverse).copy(), np.empty(columns, np.float32)
    nearest, costs = np.empty(columns, np.int64), np.empty(columns, np.float32)
    for i in range(columns):
        nearest[i] = _nearest_from(0, weights[i], levels)
        costs[i] = _cost(weights[i], nearest[i], levels, diagonal[i])
    at = int(np.argmin(costs))
    for step in range(columns):
        chosen, code, last = left[at], nearest[at], columns - 1 - step
        codes[chosen] = code
        root = np.sqrt(diagonal[at])
        error = (weights[at] - levels[code]) / root
        left[at], diagonal[at], weights[at], nearest[at] = left[last], diagonal[last], weights[last], nearest[last]
        mine = entries[:last]
        for place in range(last):
            mine[place] = inverse[chosen, left[place]]
        for s in range(step):
            line, factor[s, at], own = factor[s, :last], factor[s, last], factor[s, at]
            for place in range(last):
                mine[place] -= own * line[place]
        least = np.inf
        line = factor[step]
        for place in range(last):
            entry = mine[place] / root
            line[place] = entry
            diagonal[place] = max(diagonal[place] - entry * entry, LEAST * inverse[left[place], left[place]])
            weights[place] -= error * entry
            nearest[place] = _nearest_from(nearest[place], weights[place], levels)
            cost = _cost(weights[place], nearest[place], levels, diagonal[place])
            if cost < least:
                at, least = place, cost


@njit(parallel=True, cache=True)
def solve_rows(weights, inverse, levels, codes, threads):
    """Codes of all rows, each solved in its own order.

    weights   float32 [R, C], changed in place
    inverse   float32 [C, C], of the damped second moments
    levels    float32 [R, K] ascending, each row's values
    codes     uint8 [R, C], written
    threads   so many rows are solved at once; each takes work space of the size of `inverse`
    """
    columns = weights.shape[1]
    for thread in prange(threads):
        factor = np.empty((columns, columns), np.float32)
        for r in range(thread, weights.shape[0], threads):
            _solve_row(weights[r], inverse, levels[r], codes[r], factor)
