"""GGUF's types of two and three levels, named and laid out as in llama.cpp (see `formats.gguf`)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lqexport.formats.codec import Grid, Planes, ScaleFormat
from lqexport.formats.gguf import Bits, BlockType, integer_levels


class TQ1_0(BlockType):
    """256 weights, 54 bytes: d * (t - 1) with five ternary digits t in a byte, and four in each of the last four.

    A byte is a number below 3^5 as a fraction of 256, rounded up. Multiplied by 3, its part above 256 is the first
    digit.
    """

    name = "gguf:TQ1_0"
    block = 256
    members = np.dtype([("first", "u1", 32), ("second", "u1", 16), ("last", "u1", 4), ("d", "<f2")])
    digits = (("first", 5), ("second", 5), ("last", 4))
    """The members that hold codes, and the digits in each of their bytes. Digit k of all bytes comes before digit
    k + 1 of any."""
    levels = integer_levels(-1, 1)
    scale = ScaleFormat(256)

    def _read_codes(self, blocks: np.ndarray) -> NDArray[np.uint8]:
        powers = 3 ** np.arange(5, dtype=np.uint8)[:, None]
        moved = [blocks[member][:, :, None] * powers[:count] for member, count in self.digits]
        fractions = np.concatenate([part.reshape(*blocks.shape, -1) for part in moved], axis=-1)
        return (fractions.astype(np.uint16) * 3 >> 8).astype(np.uint8)

    def _write_codes(self, blocks: np.ndarray, codes: NDArray[np.uint8]) -> None:
        start = 0
        for member, count in self.digits:
            size = blocks.dtype[member].shape[0]
            digits = codes[..., start : start + count * size].reshape(*blocks.shape, count, size).astype(np.uint16)
            numbers = np.moveaxis(digits, 2, -1) @ (3 ** np.arange(4, 4 - count, -1, dtype=np.uint16))
            blocks[member] = (numbers * 256 + 242) // 243
            start += count * size


class TQ2_0(BlockType):
    """256 weights, 66 bytes: d * (q - 1) with q in 0..2, two bits each.

    llama.cpp decodes the code 3, which its quantizer never writes, to 2 d. A grid with that level is read, and not
    written.
    """

    name = "gguf:TQ2_0"
    block = 256
    members = np.dtype([("qs", "u1", 64), ("d", "<f2")])
    code_bits = (Bits("qs", 2, 32),)
    levels = integer_levels(-1, 1)
    scale = ScaleFormat(256)

    def unpack(self, planes: Planes, columns: int) -> tuple[Grid, NDArray[np.uint8]]:
        """See `codec.GridCodec`. The grid has a fourth level if a code is 3."""
        grid, codes = super().unpack(planes, columns)
        return (replace(grid, levels=integer_levels(-1, 2)) if int(codes.max()) == 3 else grid), codes


class Q1_0(BlockType):
    """128 weights, 18 bytes: d for a bit that is set, else -d."""

    name = "gguf:Q1_0"
    block = 128
    members = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
    code_bits = (Bits("qs", 1, 1),)
    levels = np.array([-1, 1], np.float32)
    scale = ScaleFormat(128)


GGUF_TERNARY = (TQ1_0(), TQ2_0(), Q1_0())
