"""Float32 products on the CPU by the faster of torch's two libraries.

torch multiplies float32 matrices by MKL, which leaves AVX-512 unused on processors that are not Intel's: half of the
rate there. oneDNN, which torch has too, uses it everywhere. The choice follows from the processor alone, so that all
processes of a machine, and a run that goes on, get the same bits.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def has_fast_products() -> bool:
    """Returns whether oneDNN multiplies float32 matrices of the CPU: with AVX-512, if this torch has the operator."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
    return wide and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def times_transposed(left: Tensor, right: Tensor) -> Tensor:
    """Returns left @ right^T, float32 [M, N], for float32 left [M, K] and right [N, K]."""
    if _is_fast(left, right):
        # On matrices that are not contiguous, oneDNN may take a thousand times as long.
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            left.contiguous(), right.contiguous(), None, "none", [], ""
        )
        return product
    return left @ right.mT


def add_times_transposed(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left @ right^T to a float32 matrix [M, N], for float32 left [M, K] and right [N, K]."""
    if _is_fast(left, right):
        total += times_transposed(left, right)
    else:
        total.addmm_(left, right.mT)


def _is_fast(left: Tensor, right: Tensor) -> bool:
    on_cpu = left.device.type == right.device.type == "cpu" and left.dtype == right.dtype == torch.float32
    return on_cpu and has_fast_products() and left.numel() > 0 and right.numel() > 0
