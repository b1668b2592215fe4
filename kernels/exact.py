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


@njit(cache=True, fastmath={"reassoc", "nsz", "contract"})
def _dot(left, right):
    total = np.float32(0)
    for j in range(left.shape[0]):
        total += left[j] * right[j]
    return total


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
    """Codes of one row. weights [C] change in place;  factor [C, C] is work space, row i for V's entries of column i"""
    columns = weights.shape[0]
    left, diagonal, costs = np.arange(columns), np.diag(inverse).copy(), np.empty(columns, np.float32)
    for i in range(columns):
        codes[i] = _nearest_from(0, weights[i], levels)
        costs[i] = _cost(weights[i], codes[i], levels, diagonal[i])
    at = int(np.argmin(costs))
    for step in range(columns):
        chosen, last = left[at], columns - 1 - step
        left[at] = left[last]
        root = np.sqrt(diagonal[chosen])
        error = (weights[chosen] - levels[codes[chosen]]) / root
        mine, column = factor[chosen, :step], inverse[chosen]
        least = np.inf
        for place in range(last):
            i = left[place]
            entry = (column[i] - _dot(mine, factor[i, :step])) / root
            factor[i, step] = entry
            diagonal[i] = max(diagonal[i] - entry * entry, LEAST * inverse[i, i])
            weights[i] -= error * entry
            codes[i] = _nearest_from(codes[i], weights[i], levels)
            cost = _cost(weights[i], codes[i], levels, diagonal[i])
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
