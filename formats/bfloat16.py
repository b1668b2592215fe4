"""bfloat16 in NumPy, which has no such dtype: the upper 2 bytes of the IEEE single precision number, as uint16."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def to_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Returns the bits of float32 values rounded to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    odd = (bits >> 16) & 1
    # As in ggml, a NaN becomes quiet and keeps its sign and upper payload. Rounding could make it infinite.
    quiet = (bits >> 16) | 0x40
    return np.where(np.isnan(values), quiet, (bits + (odd + 0x7FFF)) >> 16).astype("<u2")


def of_bits(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Returns the float32 values of bfloat16 bits, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns float32 values rounded to the nearest bfloat16, ties to even."""
    return of_bits(to_bits(values))
