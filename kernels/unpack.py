"""Decodes bit streams of the native formats to weights on the CPU: compiled with numba, parallel over rows.

`kernels.native_decode` calls these functions; `formats.native` describes the bit stream. In the shapes, R is rows, C
columns, and G groups.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange


@njit(cache=True)
def _unpack(row, bits, codes):
    """Unpacks a row's bit stream to codes uint8 [C].

    Eight codes fill `bits` whole bytes, which are the low bytes of one 64-bit word.
    """
    mask = np.uint64((1 << bits) - 1)
    for block in range((codes.shape[0] + 7) // 8):
        word = np.uint64(0)
        for i in range(min(bits, row.shape[0] - block * bits)):
            word |= np.uint64(row[block * bits + i]) << np.uint64(8 * i)
        for j in range(min(8, codes.shape[0] - block * 8)):
            codes[block * 8 + j] = (word >> np.uint64(bits * j)) & mask


@njit(parallel=True, cache=True)
def table(stream, bits, levels, out):
    """Writes levels[row, code] to `out`.

    stream   uint8 [R, bytes]
    levels   float32 [R, 2^bits]
    out      float32 [R, C]
    """
    for r in prange(out.shape[0]):
        codes = np.empty(out.shape[1], np.uint8)
        _unpack(stream[r], bits, codes)
        for c in range(out.shape[1]):
            out[r, c] = levels[r, codes[c]]


@njit(parallel=True, cache=True)
def scaled(stream, bits, first, scale, offset, out):
    """Writes scale * (code - first) + offset to `out`.

    stream   uint8 [R, bytes]
    scale, offset   float32 [R, G]
    out      float32 [R, C]
    """
    group = out.shape[1] // scale.shape[1]
    for r in prange(out.shape[0]):
        codes = np.empty(out.shape[1], np.uint8)
        _unpack(stream[r], bits, codes)
        for g in range(scale.shape[1]):
            for c in range(g * group, (g + 1) * group):
                out[r, c] = scale[r, g] * np.float32(np.int16(codes[c]) - first) + offset[r, g]
