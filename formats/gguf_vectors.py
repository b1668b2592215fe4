"""GGUF's i-quants of 1 to 3 bits, which choose 4 or 8 weights at once from a codebook.

Names, structs and order of bytes are llama.cpp's (ggml-common.h, ggml-quants.c), as in `formats.gguf`. The codebooks
are data of the format: gguf-py has them.

    weight = d * (2 s + 1) * vector[j] * sign[j]             IQ2 and IQ3; the codebook's magnitudes times a constant
    weight = d * (2 s + 1) * (vector[j] + delta)             IQ1; delta is 1/8 or -1/8

All products are exact in float32.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from gguf import quants
from numpy.typing import NDArray

from lqexport.formats.codebook import Codebook
from lqexport.formats.codec import ScaleFormat
from lqexport.formats.gguf import BlockType, Subs, gather, spread

Bytes = NDArray[np.uint8]
Levels = NDArray[np.float32]
IQ2_LEVELS: Levels = np.array([-5.375, -3.125, -1, 1, 3.125, 5.375], np.float32)
"""An eighth of the magnitudes 8, 25 and 43 that the codebooks of IQ2 have."""
IQ3_XXS_LEVELS: Levels = np.array([-15.5, *range(-13, 14, 2), 15.5], np.float32)
"""A fourth of the magnitudes 4, 12 ... 52 and 62."""
IQ3_S_LEVELS: Levels = np.arange(-15, 16, 2, dtype=np.float32)
IQ1_LEVELS: Levels = np.array([-1.125, -0.875, -0.125, 0.125, 0.875, 1.125], np.float32)
"""What IQ1's -1, 0 and 1 become by a delta of -1/8 or 1/8."""


@cache
def codebook(type_name: str) -> Codebook:
    """Returns the codebook of an i-quant, whose vectors gguf-py has."""
    quant = getattr(quants, type_name)
    quant.init_grid()
    grid = quant.grid.reshape(quant.grid_shape)
    if type_name in ("IQ1_S", "IQ1_M"):
        return Codebook(6, (2 * grid + 2).astype(np.uint8), lift=32 if type_name == "IQ1_S" else 8)
    magnitudes = np.unique(grid)
    codes = (np.searchsorted(magnitudes, grid) + len(magnitudes)).astype(np.uint8)
    return Codebook(2 * len(magnitudes), codes, even=type_name in ("IQ2_XXS", "IQ2_XS", "IQ3_XXS"))


def _signs_of_seven_bits() -> Bytes:
    """Returns the eight sign bits of each index of seven bits, uint8 [128]. The number of minus signs is even."""
    index = np.arange(128, dtype=np.uint8)
    parity = np.unpackbits(index[:, None], axis=1).sum(1, dtype=np.uint8) & 1
    return index | parity << np.uint8(7)


EVEN_SIGNS = _signs_of_seven_bits()


def _shifted(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Returns `count` integers of each packed number, [..., count], the first in its lowest bits."""
    return packed[..., None] >> (bits * np.arange(count)).astype(packed.dtype) & packed.dtype.type(2**bits - 1)


def _joined(integers: np.ndarray, bits: int, dtype: type) -> np.ndarray:
    """Returns integers [..., count] packed into one number each, the inverse of `_shifted`."""
    shifted = integers.astype(dtype) << (bits * np.arange(integers.shape[-1])).astype(dtype)
    return np.asarray(np.bitwise_or.reduce(shifted, axis=-1))


def scattered_half(words: NDArray[np.uint16]) -> NDArray[np.float16]:
    """Returns the float16 whose bits are the highest four of each of four words, the lowest bits first.

    words   uint16 [..., 4]
    """
    return _joined(words.astype(np.uint16) >> 12, 4, np.uint16).view(np.float16)


def _indices(low: Bytes, high: np.ndarray) -> NDArray[np.uint16]:
    """Returns indices whose low eight bits and whose high bits are apart."""
    return low | high.astype(np.uint16) << np.uint16(8)


class _VectorType(BlockType):
    """A block type that stores indices of vectors, and a byte of flags for each eight weights."""

    block = 256

    @property
    def codebook(self) -> Codebook:
        """See `codec.GridCodec`."""
        return codebook(self.name.removeprefix("gguf:"))

    def _read_codes(self, blocks: np.ndarray) -> Bytes:
        indices, flags = (part.reshape(len(blocks), -1) for part in self._read_vectors(blocks))
        return self.codebook.codes(indices, flags)

    def _write_codes(self, blocks: np.ndarray, codes: Bytes) -> None:
        indices, flags = self.codebook.find(codes.reshape(len(blocks), -1))
        self._write_vectors(
            blocks, indices.astype(np.uint16).reshape(*blocks.shape, -1), flags.reshape(*blocks.shape, -1)
        )

    def _read_vectors(self, blocks: np.ndarray) -> tuple[np.ndarray, Bytes]:
        """Returns the indices [rows, blocks, 256 / width] and the flags uint8 [rows, blocks, 32]."""
        raise NotImplementedError

    def _write_vectors(self, blocks: np.ndarray, indices: NDArray[np.uint16], flags: Bytes) -> None:
        """Writes what `_read_vectors` reads."""
        raise NotImplementedError

    def _read_subs(self, blocks: np.ndarray) -> Subs:
        return (2 * self._read_scales(blocks).astype(np.int16) + 1,)

    def _write_subs(self, blocks: np.ndarray, subs: Subs) -> None:
        self._write_scales(blocks, subs[0] >> 1)

    def _read_scales(self, blocks: np.ndarray) -> np.ndarray:
        """Returns the integer s of each group, [rows, blocks, groups]."""
        return spread(blocks["scales"], 4, 1)

    def _write_scales(self, blocks: np.ndarray, scales: NDArray[np.int16]) -> None:
        """Writes what `_read_scales` reads."""
        blocks["scales"] = gather(scales.astype(np.uint8), 4, 1)


class _WordType(_VectorType):
    """A type with words of 32 bits: four times seven signs, and a scale of four bits above them."""

    index: str
    """The member with the indices, one byte each."""
    words: str
    """The member with the words."""

    def _read_vectors(self, blocks: np.ndarray) -> tuple[np.ndarray, Bytes]:
        signs = EVEN_SIGNS[_shifted(self._part(blocks, self.words), 7, 4)]
        return self._part(blocks, self.index), signs

    def _write_vectors(self, blocks: np.ndarray, indices: NDArray[np.uint16], flags: Bytes) -> None:
        part = self._part(blocks, self.index)
        part[:] = indices.reshape(part.shape)
        words = self._part(blocks, self.words)
        words |= _joined(flags.reshape(*words.shape, 4) & 127, 7, np.uint32)

    def _read_scales(self, blocks: np.ndarray) -> np.ndarray:
        return self._part(blocks, self.words) >> 28

    def _write_scales(self, blocks: np.ndarray, scales: NDArray[np.int16]) -> None:
        words = self._part(blocks, self.words)
        words |= scales.astype(np.uint32) << 28

    def _part(self, blocks: np.ndarray, member: str) -> np.ndarray:
        """Returns a member of the blocks, as a view."""
        return blocks[member]


class IQ2_XXS(_WordType):
    """256 weights, 66 bytes: per 32 weights four indices, four times seven signs, and a scale of 4 bits."""

    name = "gguf:IQ2_XXS"
    members = np.dtype([("d", "<f2"), ("groups", np.dtype([("index", "u1", 4), ("word", "<u4")]), 8)])
    index, words = "index", "word"
    levels = IQ2_LEVELS
    scale = ScaleFormat(32, 8, 1, 31, step=2)

    def _part(self, blocks: np.ndarray, member: str) -> np.ndarray:
        return blocks["groups"][member]


class IQ2_XS(_VectorType):
    """256 weights, 74 bytes: per 8 weights an index of 9 bits and seven signs; per 16 weights a scale of 4 bits."""

    name = "gguf:IQ2_XS"
    members = np.dtype([("d", "<f2"), ("qs", "<u2", 32), ("scales", "u1", 8)])
    levels = IQ2_LEVELS
    scale = ScaleFormat(16, 16, 1, 31, step=2)

    def _read_vectors(self, blocks: np.ndarray) -> tuple[np.ndarray, Bytes]:
        return blocks["qs"] & 511, EVEN_SIGNS[blocks["qs"] >> 9]

    def _write_vectors(self, blocks: np.ndarray, indices: NDArray[np.uint16], flags: Bytes) -> None:
        blocks["qs"] = indices | (flags & 127).astype(np.uint16) << np.uint16(9)


class IQ2_S(_VectorType):
    """256 weights, 82 bytes: per 8 weights an index of 10 bits and eight signs; per 16 weights a scale of 4 bits."""

    name = "gguf:IQ2_S"
    members = np.dtype([("d", "<f2"), ("qs", "u1", 32), ("signs", "u1", 32), ("qh", "u1", 8), ("scales", "u1", 8)])
    high_bits = 2
    levels = IQ2_LEVELS
    scale = ScaleFormat(16, 16, 1, 31, step=2)

    def _read_vectors(self, blocks: np.ndarray) -> tuple[np.ndarray, Bytes]:
        return _indices(blocks["qs"], spread(blocks["qh"], self.high_bits, 1)), blocks["signs"]

    def _write_vectors(self, blocks: np.ndarray, indices: NDArray[np.uint16], flags: Bytes) -> None:
        blocks["qs"] = indices & 255
        blocks["qh"] = gather((indices >> 8).astype(np.uint8), self.high_bits, 1)
        blocks["signs"] = flags


class IQ3_XXS(_WordType):
    """256 weights, 98 bytes: per 4 weights an index; per 32 weights four times seven signs and a scale of 4 bits."""

    name = "gguf:IQ3_XXS"
    members = np.dtype([("d", "<f2"), ("qs", "u1", 64), ("words", "<u4", 8)])
    index, words = "qs", "words"
    levels = IQ3_XXS_LEVELS
    scale = ScaleFormat(32, 8, 1, 31, step=2)


class IQ3_S(IQ2_S):
    """256 weights, 110 bytes: per 4 weights an index of 9 bits; a sign each; per 32 weights a scale of 4 bits."""

    name = "gguf:IQ3_S"
    members = np.dtype([("d", "<f2"), ("qs", "u1", 64), ("qh", "u1", 8), ("signs", "u1", 32), ("scales", "u1", 4)])
    high_bits = 1
    levels = IQ3_S_LEVELS
    scale = ScaleFormat(32, 8, 1, 31, step=2)


class IQ1_S(_VectorType):
    """256 weights, 50 bytes: per 8 weights an index of 11 bits; per 32 weights a scale of 3 bits and the delta's sign.

    qh of 32 weights, the highest bit on the left:  minus  s s s  3 bits of each index, the last index first
    """

    name = "gguf:IQ1_S"
    members = np.dtype([("d", "<f2"), ("qs", "u1", 32), ("qh", "<u2", 8)])
    levels = IQ1_LEVELS
    scale = ScaleFormat(32, 8, 1, 15, step=2)

    def _read_vectors(self, blocks: np.ndarray) -> tuple[np.ndarray, Bytes]:
        high = _shifted(blocks["qh"], 3, 4).reshape(*blocks.shape, -1)
        plus = np.repeat(1 - (blocks["qh"] >> 15), 4, axis=-1).astype(np.uint8)
        return _indices(blocks["qs"], high), plus

    def _write_vectors(self, blocks: np.ndarray, indices: NDArray[np.uint16], flags: Bytes) -> None:
        blocks["qs"] = indices & 255
        high = _joined((indices >> 8).reshape(*blocks.shape, -1, 4), 3, np.uint16)
        blocks["qh"] |= high | (1 - flags[..., ::4]).astype(np.uint16) << np.uint16(15)

    def _read_scales(self, blocks: np.ndarray) -> np.ndarray:
        return blocks["qh"] >> 12 & 7

    def _write_scales(self, blocks: np.ndarray, scales: NDArray[np.int16]) -> None:
        blocks["qh"] |= scales.astype(np.uint16) << np.uint16(12)


class IQ1_M(_VectorType):
    """256 weights, 56 bytes: per 8 weights an index of 11 bits and the delta's sign; per 16 weights a scale of 3 bits.

    The highest 4 bits of the four words of `scales` are the block's float16 (`scattered_half`).
    """

    name = "gguf:IQ1_M"
    members = np.dtype([("qs", "u1", 32), ("qh", "u1", 16), ("scales", "<u2", 4)])
    supers = ("scales",)
    levels = IQ1_LEVELS
    scale = ScaleFormat(16, 16, 1, 15, step=2)

    def _read_vectors(self, blocks: np.ndarray) -> tuple[np.ndarray, Bytes]:
        high = spread(blocks["qh"], 4, 1)
        return _indices(blocks["qs"], high & 7), high >> np.uint8(3) ^ np.uint8(1)

    def _write_vectors(self, blocks: np.ndarray, indices: NDArray[np.uint16], flags: Bytes) -> None:
        blocks["qs"] = indices & 255
        blocks["qh"] = gather((indices >> 8).astype(np.uint8) | (np.uint8(1) - flags) << np.uint8(3), 4, 1)

    def _read_super(self, blocks: np.ndarray, member: str) -> NDArray[np.floating]:
        return scattered_half(blocks[member])[..., None].reshape(blocks.shape)

    def _write_super(self, blocks: np.ndarray, member: str, supers: NDArray[np.floating]) -> None:
        blocks[member] |= _shifted(supers.astype(np.float16).view(np.uint16), 4, 4) << np.uint16(12)

    def _read_scales(self, blocks: np.ndarray) -> np.ndarray:
        return _shifted(blocks["scales"], 3, 4).reshape(*blocks.shape, -1)

    def _write_scales(self, blocks: np.ndarray, scales: NDArray[np.int16]) -> None:
        blocks["scales"] |= _joined(scales.reshape(*blocks.shape, 4, 4), 3, np.uint16)


GGUF_VECTORS = (IQ1_S(), IQ1_M(), IQ2_XXS(), IQ2_XS(), IQ2_S(), IQ3_XXS(), IQ3_S())
