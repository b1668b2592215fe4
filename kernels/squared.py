"""Choosing EXL2's scale codes on the CPU: for every row of a group and every maximum, the code with the least error.

`lqexport.fit_sections` calls it, and does the same in torch on other devices; a test holds the two equal.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

NARROW, WIDE = 0.2, 1.3
"""Scales that reach less than the one share of the row's largest weight are not tried, and none beyond the first that
reaches more than the other."""


@njit(cache=True, fastmath={"reassoc", "nsz", "contract"})
def _error(x, weight, scale, low, high):
    inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
    error = np.float32(0)
    for i in range(x.shape[0]):
        off = x[i] - scale * min(max(np.rint(x[i] * inverse), low), high)
        error += weight[i] * off * off
    return error


@njit(parallel=True, cache=True)
def best_subs(weights, weight, scales, low, high, errors, subs):
    """For every row and maximum, the scale code that rounds the row with the least weighted squared error.

    weights [R, g];  weight [g];  scales [M, 16], ascending, of each maximum and code;  low, high   the end levels
    errors [R, M], subs int16 [R, M], written
    """
    for r in prange(weights.shape[0]):
        x = weights[r]
        largest = np.abs(x).max()
        for m in range(scales.shape[0]):
            errors[r, m] = np.inf
            for s in range(16):
                scale = scales[m, s]
                if s < 15 and -low * scale < NARROW * largest:
                    continue
                error = _error(x, weight, scale, low, high)
                if error < errors[r, m]:
                    errors[r, m], subs[r, m] = error, s
                if high * scale > WIDE * largest:
                    break
