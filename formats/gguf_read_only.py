"""GGUF's types that are read and not written: the i-quants of 1 to 3 bits, the ternary types, NVFP4 and Q1_0.

They have no more than `codec.Codec` asks for, a layout and a decoder. The i-quants choose 4 or 8 weights at once from a
codebook, which is data of the format: gguf-py has it. Names, structs and order of bytes are llama.cpp's (ggml-common.h,
ggml-quants.c), as in `formats.gguf`.

    weight = scale * codebook[index][j] * sign[j]             IQ2 and IQ3
    weight = scale * (codebook[index][j] + delta)             IQ1; delta is 1/8 or -1/8
    weight = scale * level[code]                              the others

All products are exact in float32.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from gguf import quants
from numpy.typing import NDArray

from lqexport.formats.checks import check_planes, check_shape
from lqexport.formats.codec import Planes
from lqexport.formats.gguf import E2M1, e2m1_ranks, spread

Floats = NDArray[np.float32]
DELTA = np.float32(0.125)
"""What IQ1_S and IQ1_M add to or subtract from a vector of the codebook."""


@cache
def codebook(type_name: str) -> Floats:
    """Returns the vectors of an i-quant, float32 [number of vectors, weights of a vector], from gguf-py."""
    quant = getattr(quants, type_name)
    quant.init_grid()
    return np.ascontiguousarray(quant.grid.reshape(quant.grid_shape))


def _signs_of_seven_bits() -> NDArray[np.uint8]:
    """Returns the eight sign bits of each index of seven bits, uint8 [128]. The number of minus signs is even."""
    index = np.arange(128, dtype=np.uint8)
    parity = np.unpackbits(index[:, None], axis=1).sum(1, dtype=np.uint8) & 1
    return index | parity << np.uint8(7)


EVEN_SIGNS = _signs_of_seven_bits()


def _signs(packed: NDArray[np.uint8]) -> Floats:
    """Returns 1 for each bit that is 0 and -1 for each that is 1, float32 [..., 8 n], of bytes uint8 [..., n]."""
    return np.float32(1) - np.float32(2) * np.unpackbits(packed, axis=-1, bitorder="little")


def _shifted(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Returns `count` integers of each packed number, [..., count], the first in its lowest bits.

    Higher bits than the integer's own stay: the caller masks them.
    """
    return packed[..., None] >> (bits * np.arange(count)).astype(packed.dtype)


def scattered_half(words: NDArray[np.uint16]) -> Floats:
    """Returns the float16 whose bits are the highest four of each of four words, the lowest bits first, as float32.

    words   uint16 [..., 4]
    """
    fourths = words.astype(np.uint16) >> 12 << np.arange(0, 16, 4, dtype=np.uint16)
    return np.bitwise_or.reduce(fourths, axis=-1).view(np.float16).astype(np.float32)


def _halves(integers: np.ndarray, factor: float) -> Floats:
    """Returns `factor * (integers + 1/2)` as float32."""
    return np.float32(factor) * (integers.astype(np.float32) + np.float32(0.5))


def _indices(low: NDArray[np.uint8], high: np.ndarray) -> NDArray[np.uint16]:
    """Returns indices whose low eight bits and whose high bits are apart."""
    return low | high.astype(np.uint16) << np.uint16(8)


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


class _Vectors(_ReadOnlyType):
    """An i-quant: vectors of a codebook."""

    def _values(self, blocks: np.ndarray) -> Floats:
        vectors = codebook(self.name.removeprefix("gguf:"))[self._vector_indices(blocks)]
        vectors = vectors.reshape(*blocks.shape, -1, 8)
        self._change(vectors, blocks)
        return vectors

    def _vector_indices(self, blocks: np.ndarray) -> np.ndarray:
        """Returns the index of each vector, [rows, blocks, ...]."""
        raise NotImplementedError

    def _change(self, vectors: Floats, blocks: np.ndarray) -> None:
        """Gives the vectors [rows, blocks, 32, 8] their signs."""
        vectors *= _signs(self._sign_bytes(blocks)[..., None])

    def _sign_bytes(self, blocks: np.ndarray) -> NDArray[np.uint8]:
        """Returns a byte of eight signs for each eight weights, uint8 [rows, blocks, 32]."""
        raise NotImplementedError


def _in_fours(words: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """Returns the sign bytes of words with four indices of seven bits each, uint8 [rows, blocks, 4 n]."""
    return EVEN_SIGNS[_shifted(words, 7, 4) & 127].reshape(*words.shape[:-1], -1)


class IQ2_XXS(_Vectors):
    """256 weights, 66 bytes: per 32 weights four indices, four times seven signs, and a scale of 4 bits."""

    name = "gguf:IQ2_XXS"
    members = np.dtype([("d", "<f2"), ("groups", np.dtype([("index", "u1", 4), ("word", "<u4")]), 8)])

    def _multiples(self, blocks: np.ndarray) -> Floats:
        return _halves(blocks["groups"]["word"] >> 28, 0.25)

    def _vector_indices(self, blocks: np.ndarray) -> np.ndarray:
        return blocks["groups"]["index"]

    def _sign_bytes(self, blocks: np.ndarray) -> NDArray[np.uint8]:
        return _in_fours(blocks["groups"]["word"])


class IQ2_XS(_Vectors):
    """256 weights, 74 bytes: per 8 weights an index of 9 bits and seven signs; per 16 weights a scale of 4 bits."""

    name = "gguf:IQ2_XS"
    members = np.dtype([("d", "<f2"), ("qs", "<u2", 32), ("scales", "u1", 8)])

    def _multiples(self, blocks: np.ndarray) -> Floats:
        return _halves(spread(blocks["scales"], 4, 1), 0.25)

    def _vector_indices(self, blocks: np.ndarray) -> np.ndarray:
        return blocks["qs"] & 511

    def _sign_bytes(self, blocks: np.ndarray) -> NDArray[np.uint8]:
        return EVEN_SIGNS[blocks["qs"] >> 9]


class IQ2_S(_Vectors):
    """256 weights, 82 bytes: per 8 weights an index of 10 bits and eight signs; per 16 weights a scale of 4 bits."""

    name = "gguf:IQ2_S"
    members = np.dtype([("d", "<f2"), ("qs", "u1", 32), ("signs", "u1", 32), ("qh", "u1", 8), ("scales", "u1", 8)])

    _multiples = IQ2_XS._multiples

    def _vector_indices(self, blocks: np.ndarray) -> np.ndarray:
        return _indices(blocks["qs"], spread(blocks["qh"], 2, 1))

    def _sign_bytes(self, blocks: np.ndarray) -> NDArray[np.uint8]:
        return blocks["signs"]


class IQ3_XXS(_Vectors):
    """256 weights, 98 bytes: per 4 weights an index; per 32 weights four times seven signs and a scale of 4 bits."""

    name = "gguf:IQ3_XXS"
    members = np.dtype([("d", "<f2"), ("qs", "u1", 64), ("words", "<u4", 8)])

    def _multiples(self, blocks: np.ndarray) -> Floats:
        return _halves(blocks["words"] >> 28, 0.5)

    def _vector_indices(self, blocks: np.ndarray) -> np.ndarray:
        return blocks["qs"]

    def _sign_bytes(self, blocks: np.ndarray) -> NDArray[np.uint8]:
        return _in_fours(blocks["words"])


class IQ3_S(_Vectors):
    """256 weights, 110 bytes: per 4 weights an index of 9 bits; a sign each; per 32 weights a scale of 4 bits."""

    name = "gguf:IQ3_S"
    members = np.dtype([("d", "<f2"), ("qs", "u1", 64), ("qh", "u1", 8), ("signs", "u1", 32), ("scales", "u1", 4)])

    def _multiples(self, blocks: np.ndarray) -> Floats:
        return _halves(spread(blocks["scales"], 4, 1), 2)

    def _vector_indices(self, blocks: np.ndarray) -> np.ndarray:
        return _indices(blocks["qs"], spread(blocks["qh"], 1, 1))

    _sign_bytes = IQ2_S._sign_bytes


class IQ1_S(_Vectors):
    """256 weights, 50 bytes: per 8 weights an index of 11 bits; per 32 weights a scale of 3 bits and the delta's sign.

    qh of 32 weights, the highest bit on the left:  minus  s s s  3 bits of each index, the last index first
    """

    name = "gguf:IQ1_S"
    members = np.dtype([("d", "<f2"), ("qs", "u1", 32), ("qh", "<u2", 8)])

    def _multiples(self, blocks: np.ndarray) -> Floats:
        return _halves(blocks["qh"] >> 12 & 7, 2)

    def _vector_indices(self, blocks: np.ndarray) -> np.ndarray:
        high = (_shifted(blocks["qh"], 3, 4) & 7).reshape(*blocks.shape, -1)
        return _indices(blocks["qs"], high)

    def _change(self, vectors: Floats, blocks: np.ndarray) -> None:
        vectors += np.repeat(np.where(blocks["qh"] >> 15, -DELTA, DELTA), 4, axis=-1)[..., None]


class IQ1_M(_Vectors):
    """256 weights, 56 bytes: per 8 weights an index of 11 bits and the delta's sign; per 16 weights a scale of 3 bits.

    The highest 4 bits of the four words of `scales` are the block's float16 (`scattered_half`).
    """

    name = "gguf:IQ1_M"
    members = np.dtype([("qs", "u1", 32), ("qh", "u1", 16), ("scales", "<u2", 4)])

    def _supers(self, blocks: np.ndarray) -> Floats:
        return scattered_half(blocks["scales"])

    def _multiples(self, blocks: np.ndarray) -> Floats:
        return _halves((_shifted(blocks["scales"], 3, 4) & 7).reshape(*blocks.shape, -1), 2)

    def _vector_indices(self, blocks: np.ndarray) -> np.ndarray:
        return _indices(blocks["qs"], spread(blocks["qh"], 4, 1) & 7)

    def _change(self, vectors: Floats, blocks: np.ndarray) -> None:
        vectors += np.where(spread(blocks["qh"], 4, 1) & 8, -DELTA, DELTA)[..., None]


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


GGUF_READ_ONLY = (
    IQ1_S(), IQ1_M(), IQ2_XXS(), IQ2_XS(), IQ2_S(), IQ3_XXS(), IQ3_S(), TQ1_0(), TQ2_0(), Q1_0(), NVFP4()
)  # fmt: skip
