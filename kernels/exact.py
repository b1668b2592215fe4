"""Optimal Brain Quantization, compiled for the CPU with numba. Each row has its own order; rows run in parallel.

At every step a row rounds the remaining column with the lowest cost, (w_i - q_i)^2 / [H^-1]_ii, spreads the error over
the other columns, and removes the column from H^-1. A weight that has left the grid is rounded at once, the farthest
first, while there are columns that can take its error (Frantar and Alistarh 2022, arXiv 2208.11580, section 5).

Removing columns one after the other is a Cholesky factorization of H^-1 in the row's order: if V is the columns of the
Cholesky factor so far, H^-1 - V V^T remains. So H^-1 does not change and all rows share it. A step needs the diagonal
and one column of the remaining matrix, and computes them by a product with V. That is n^3 / 6 multiplications for n
columns, and only V is written.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

LEAST = np.float32(1e-6)
"""The least share of H^-1's diagonal that remains. It keeps rounding errors from making the diagonal negative."""


@njit(cache=True, inline="always")
def _nearest_from(code, weight, levels):
    """Returns the code of the level nearest to a weight. It steps from a code that was near before, since few weights
    move far."""
    while code + 1 < levels.shape[0] and weight > 0.5 * (levels[code] + levels[code + 1]):
        code += 1
    while code > 0 and weight <= 0.5 * (levels[code - 1] + levels[code]):
        code -= 1
    return code


@njit(cache=True, inline="always")
def _cost(weight, code, levels, diagonal):
    """Returns the loss that rounding a weight adds.

    For a weight that lies outside the grid by more than half of the grid's last step, returns minus the squared
    distance, so that the farthest weight is rounded first.
    """
    error, last = weight - levels[code], levels.shape[0] - 1
    below, above = 0.5 * (levels[0] - levels[1]), 0.5 * (levels[last] - levels[last - 1])
    if (code == 0 and error < below) or (code == last and error > above):
        return -error * error
    return error * error / diagonal


@njit(cache=True)
def _solve_row(weights, inverse, levels, codes, cholesky):
    """Finds the codes of one row.

    The remaining columns are kept together in the first places of every array; `left` holds the column of each place.
    So a step computes its entries of V from whole lines, and every sum has the order of the steps.

    weights   [C], changed in place
    codes     uint8 [C], written
    cholesky  [C, C], work space; line s holds the entries of V of step s
    """
    columns = weights.shape[0]
    left, diagonal, entries = np.arange(columns), np.diag(inverse).copy(), np.empty(columns, np.float32)
    nearest, costs = np.empty(columns, np.int64), np.empty(columns, np.float32)
    for i in range(columns):
        nearest[i] = _nearest_from(0, weights[i], levels)
        costs[i] = _cost(weights[i], nearest[i], levels, diagonal[i])
    cheapest = int(np.argmin(costs))
    for step in range(columns):
        chosen, code, last = left[cheapest], nearest[cheapest], columns - 1 - step
        codes[chosen] = code
        root = np.sqrt(diagonal[cheapest])
        error = (weights[cheapest] - levels[code]) / root
        left[cheapest], diagonal[cheapest], weights[cheapest], nearest[cheapest] = (
            left[last],
            diagonal[last],
            weights[last],
            nearest[last],
        )
        remaining_column = entries[:last]
        for place in range(last):
            remaining_column[place] = inverse[chosen, left[place]]
        for s in range(step):
            line, cholesky[s, cheapest], multiplier = cholesky[s, :last], cholesky[s, last], cholesky[s, cheapest]
            for place in range(last):
                remaining_column[place] -= multiplier * line[place]
        least = np.inf
        line = cholesky[step]
        for place in range(last):
            entry = remaining_column[place] / root
            line[place] = entry
            diagonal[place] = max(diagonal[place] - entry * entry, LEAST * inverse[left[place], left[place]])
            weights[place] -= error * entry
            nearest[place] = _nearest_from(nearest[place], weights[place], levels)
            cost = _cost(weights[place], nearest[place], levels, diagonal[place])
            if cost < least:
                cheapest, least = place, cost


@njit(parallel=True, cache=True)
def solve_rows(weights, inverse, levels, codes, threads):
    """Finds the codes of all rows, each in its own order.

    weights   float32 [R, C], changed in place
    inverse   float32 [C, C], the inverse of the damped Hessian
    levels    float32 [R, K], the ascending values of each row
    codes     uint8 [R, C], written
    threads   number of rows that are solved at once; each takes work space of the size of `inverse`
    """
    columns = weights.shape[1]
    for thread in prange(threads):
        cholesky = np.empty((columns, columns), np.float32)
        for r in range(thread, weights.shape[0], threads):
            _solve_row(weights[r], inverse, levels[r], codes[r], cholesky)
