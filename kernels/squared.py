"""Choosing EXL2's scale codes on the CPU: for every row of a group and every maximum, the code with the least error.

`lqexport.grids.fit_sections` calls it, and does the same in torch on other devices; a test holds the two equal.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

NARROW, WIDE = 0.2, 1.3
"""Scales that reach less than the one share of the row's largest weight are not tried, and none beyond the first that
reaches more than the other."""


@njit(cache=True)
def _errors(x, weight, scales, low, high, inverse, errors):
    """Of each scale, side by side (see `kernels.cpu`)."""
    for s in range(scales.shape[0]):
        inverse[s] = np.float32(1) / scales[s] if scales[s] > 0 else np.float32(0)
        errors[s] = 0
    for i in range(x.shape[0]):
        for s in range(scales.shape[0]):
            off = x[i] - scales[s] * min(max(np.rint(x[i] * inverse[s]), low), high)
            errors[s] += weight[i] * off * off


@njit(parallel=True, cache=True)
def best_subs(weights, weight, scales, low, high, errors, subs):
    """For every row and maximum, the scale code that rounds the row with the least weighted squared error.

    weights [R, g];  weight [g];  scales [M, 16], ascending, of each maximum and code;  low, high   the end levels
    errors [R, M], subs int16 [R, M], written
    """
    for r in prange(weights.shape[0]):
        x, inverse, tried = weights[r], np.empty(16, np.float32), np.empty(16, np.float32)
        largest = np.abs(x).max()
        for m in range(scales.shape[0]):
            first = 0
            while first < 15 and -low * scales[m, first] < NARROW * largest:
                first += 1
            last = first
            while last < 15 and high * scales[m, last] <= WIDE * largest:
                last += 1
            _errors(x, weight, scales[m, first : last + 1], low, high, inverse, tried)
            best = 0
            for s in range(1, last + 1 - first):
                if tried[s] < tried[best]:
                    best = s
            errors[r, m], subs[r, m] = tried[best], first + best
