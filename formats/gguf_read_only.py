"""GGUF's types that are read and not written: the ternary types, NVFP4 and Q1_0.

They have no more than `codec.Codec` asks for, a layout and a decoder. Names, structs and order of bytes are llama.cpp's
(ggml-common.h, ggml-quants.c), as in `formats.gguf`. A weight is `scale * level[code]`, exact in float32.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lqexport.formats.checks import check_planes, check_shape
from lqexport.formats.codec import Planes
from lqexport.formats.gguf import E2M1, e2m1_ranks, spread

Floats = NDArray[np.float32]


def _signs(packed: NDArray[np.uint8]) -> Floats:
    """Returns 1 for each bit that is 0 and -1 for each that is 1, float32 [..., 8 n], of bytes uint8 [..., n]."""
    return np.float32(1) - np.float32(2) * np.unpackbits(packed, axis=-1, bitorder="little")


class _ReadOnlyType:
    """A block type that is read and not written; its interface is `codec.Codec`.

    members   the block's struct
    """

    name: str
    block = 256
    members: np.dtype

    def layout(self, rows: int, columns: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """See `codec.Codec`. The plane is `blocks`, uint8 [rows, bytes of a row]. Raises ValueError if the columns do
        not fill whole blocks."""
        check_shape(self, rows, columns)
        return {"blocks": (np.dtype(np.uint8), (rows, columns // self.block * self.members.itemsize))}

    def decode(self, planes: Planes, columns: int) -> Floats:
        """See `codec.Codec`. Raises ValueError if the plane is not that of such a matrix."""
        rows = check_planes(self, planes, columns)
        blocks = np.ascontiguousarray(planes["blocks"]).view(self.members)
        scales = self._scales(blocks)
        values = self._values(blocks).reshape(*scales.shape, -1)
        values *= scales[..., None]
        return values.reshape(rows, columns)

    def _scales(self, blocks: np.ndarray) -> Floats:
        """Returns the scales, float32 [rows, blocks, groups]. The groups share a block's weights evenly."""
        return self._supers(blocks)[..., None] * self._multiples(blocks)

    def _supers(self, blocks: np.ndarray) -> Floats:
        """Returns the float16 of each block as float32 [rows, blocks]."""
        return blocks["d"].astype(np.float32)

    def _multiples(self, blocks: np.ndarray) -> Floats:
        """Returns what each group multiplies the block's float16 by, float32 [rows, blocks, groups]."""
        return np.ones((*blocks.shape, 1), np.float32)

    def _values(self, blocks: np.ndarray) -> Floats:
        """Returns the weights before they are scaled, float32 [rows, blocks, ...], as a new array."""
        raise NotImplementedError


class TQ1_0(_ReadOnlyType):
    """256 weights, 54 bytes: d * (t - 1) with five ternary digits t in a byte, and four in each of the last four.

    A byte is a number below 3^5 as a fraction of 256. Multiplied by 3, its part above 256 is the first digit.
    """

    name = "gguf:TQ1_0"
    members = np.dtype([("first", "u1", 32), ("second", "u1", 16), ("last", "u1", 4), ("d", "<f2")])

    def _values(self, blocks: np.ndarray) -> Floats:
        powers = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]
        parts = [(blocks["first"], 5), (blocks["second"], 5), (blocks["last"], 4)]
        moved = [(part[:, :, None] * powers[:digits]).reshape(*blocks.shape, -1) for part, digits in parts]
        digits = np.concatenate(moved, axis=-1).astype(np.uint16) * 3 >> 8
        return digits.astype(np.float32) - 1


class TQ2_0(_ReadOnlyType):
    """256 weights, 66 bytes: d * (q - 1) with q in 0..2, two bits each. The code 3 decodes to 2 d."""

    name = "gguf:TQ2_0"
    members = np.dtype([("qs", "u1", 64), ("d", "<f2")])

    def _values(self, blocks: np.ndarray) -> Floats:
        return spread(blocks["qs"], 2, 32).astype(np.float32) - 1


class Q1_0(_ReadOnlyType):
    """128 weights, 18 bytes: d for a bit that is set, else -d."""

    name = "gguf:Q1_0"
    block = 128
    members = np.dtype([("d", "<f2"), ("qs", "u1", 16)])

    def _values(self, blocks: np.ndarray) -> Floats:
        return -_signs(blocks["qs"])


def _small_scales() -> Floats:
    """Returns the scale of each byte of NVFP4, float32 [256]: half a float8 (E4M3, bias 7) whose sign does not count.

    The byte 127, which stands for NaN, is 0 as in llama.cpp; 255 is not.
    """
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    values = np.where(exponent, np.ldexp(mantissa + 8.0, exponent - 11), np.ldexp(mantissa * 1.0, -10))
    values[127] = 0
    return values.astype(np.float32)


class NVFP4(_ReadOnlyType):
    """64 weights, 36 bytes: s * q with q in E2M1 and s half a small float per 16 weights, stored in a byte each."""

    name = "gguf:NVFP4"
    block = 64
    members = np.dtype([("scales", "u1", 4), ("qs", "u1", 32)])
    small_scales = _small_scales()

    def _scales(self, blocks: np.ndarray) -> Floats:
        return self.small_scales[blocks["scales"]]

    def _values(self, blocks: np.ndarray) -> Floats:
        return E2M1[e2m1_ranks(spread(blocks["qs"], 4, 8))]


GGUF_READ_ONLY = (TQ1_0(), TQ2_0(), Q1_0(), NVFP4())
