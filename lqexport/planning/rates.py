"""Measures how fast this machine multiplies matrices."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from lqexport.planning.cost import Rates
from lqexport.recipe import ComputeDtype


@functools.cache
def measured_rate(device: str, dtype: torch.dtype, size: int = 1024, seconds: float = 0.3) -> float:
    """Returns the floating-point operations per second of products of `size` x `size` matrices on a device.

    It is the best of several products in about `seconds` seconds, and measured once in a process.
    """
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    synchronize: Callable[[], None] = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds or best == float("inf"):
        start = time.perf_counter()
        left @ right
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def measured_rates(device: str, compute_dtype: ComputeDtype) -> Rates:
    """Returns the measured rates of matrix products on a device, in the dtypes that a run multiplies in.

    `compute_dtype` is that of its passes.
    """
    dtypes = (torch.float32, getattr(torch, compute_dtype), torch.float64)
    return Rates(*(measured_rate(device, dtype) for dtype in dtypes))
