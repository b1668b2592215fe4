"""The choice of EXL2's scale codes on the CPU: for every row of a group and every maximum, the code of least error.

`lqexport.grids.fit_sections` calls it, and does the same in torch on other devices. A test checks that both give the
same results.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

NARROW, WIDE = 0.2, 1.3
"""Shares of the row's largest weight. Scales whose largest value is less than the first share are not tried, and of
those whose largest value is more than the second share, only the first is tried."""


@njit(cache=True)
def _errors(x, weight, scales, low, high, inverse, errors):
    """Computes the row's weighted squared error under each scale, all scales side by side (see `kernels.cpu`)."""
    for s in range(scales.shape[0]):
        inverse[s] = np.float32(1) / scales[s] if scales[s] > 0 else np.float32(0)
        errors[s] = 0
    for i in range(x.shape[0]):
        for s in range(scales.shape[0]):
            difference = x[i] - scales[s] * min(max(np.rint(x[i] * inverse[s]), low), high)
            errors[s] += weight[i] * difference * difference


@njit(parallel=True, cache=True)
def best_subs(weights, weight, scales, low, high, errors, subs):
    """Finds the scale code with the least weighted squared error for every row and maximum.

    weights   [R, g], the group's weights
    weight    [g], the importance of each column
    scales    [M, 16], the scale of each maximum and code, ascending
    low, high   the lowest and the highest level
    errors    [R, M], written
    subs      int16 [R, M], the scale codes, written
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
