"""The thread pool of the compiled loops."""

from __future__ import annotations

import numpy as np
from numba import njit, prange


@njit(parallel=True, cache=True)
def _touch(done):
    """Writes an array in parallel, which starts the pool."""
    for i in prange(done.shape[0]):
        done[i] = 1


def start_pool() -> None:
    """Starts numba's thread pool now, so that it does not start during other work."""
    _touch(np.zeros(1, np.uint8))
