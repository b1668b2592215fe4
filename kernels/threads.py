"""The threads that the compiled loops run in."""

from __future__ import annotations

import numpy as np
from numba import njit, prange


@njit(parallel=True, cache=True)
def _touch(done):
    for i in prange(done.shape[0]):
        done[i] = 1


def start_pool() -> None:
    """Start numba's pool of threads now, not in the midst of other work."""
    _touch(np.zeros(1, np.uint8))
