"""MXINT as LQER uses it: signed integers that share a power of two per group of columns (block floating point).

A weight is m * 2^(e - (B - 1)). m is an integer of B bits in -(2^(B-1) - 1) .. 2^(B-1) - 1, and the group's columns
share the exponent e. m has 2^B - 1 values, because LQER's code has a sign and a magnitude. That code only emulates
MXINT, so the byte layout is this project's. It has the 8 bits of exponent of LQER's code, and so B + 8 / group bits per
weight. (LQER's tables count 4 bits of exponent.)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lqexport.formats.checks import check_grid, check_planes, check_shape
from lqexport.formats.codec import FloatFormat, Grid, GridCodec, Planes, ScaleFormat, Scales
from lqexport.formats.native import pack_bits, row_bytes, unpack_bits

BITS = (2, 3, 4, 6, 8)
GROUPS = (16, 32)
BIAS = 127
LOWEST, HIGHEST = -24, 15
"""The lowest and highest exponent of a group's 2^(e - (B - 1)): those of a float16."""


class MXInt(GridCodec):
    """The codec `native:mxint-B-gN`: B-bit integers, with one exponent for N columns.

    planes   codes      uint8 [rows, ceil(columns * B / 8)], m + 2^(B-1) - 1, the bit stream of `formats.native`
             exponents  uint8 [rows, columns / N], e + 127; 2^(e - (B - 1)) must be 2^-24 to 2^15
    decode   2^(e - (B - 1)) * m
    """

    offset = None
    scale: ScaleFormat
    levels: NDArray[np.float32]

    def __init__(self, bits: int, group: int) -> None:
        self.bits = bits
        self.name = f"native:mxint-{bits}-g{group}"
        self.block = group
        self.level_count = 2**bits - 1
        largest = 2 ** (bits - 1) - 1
        self.levels = np.arange(-largest, largest + 1, dtype=np.float32)
        self.scale = ScaleFormat(group, floats=FloatFormat(0, LOWEST, 2.0**LOWEST, 2.0**HIGHEST))

    def layout(self, rows: int, columns: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """See `codec.Codec`. Raises ValueError if the columns are not a multiple of N."""
        check_shape(self, rows, columns)
        byte = np.dtype(np.uint8)
        return {
            "codes": (byte, (rows, row_bytes(columns, self.bits))),
            "exponents": (byte, (rows, self.scale.groups(columns))),
        }

    def encode(self, grid: Grid, codes: NDArray[np.uint8]) -> Planes:
        """See `codec.GridCodec`. Raises ValueError for a grid of another format."""
        check_grid(self, grid, codes)
        assert isinstance(grid.scale, Scales)  # check_grid
        _, power = np.frexp(grid.scale.supers)  # frexp writes 2^k as 0.5 * 2^(k + 1)
        exponents = power + (self.bits - 2) + BIAS
        return {"codes": pack_bits(codes, self.bits), "exponents": exponents.astype(np.uint8)}

    def unpack(self, planes: Planes, columns: int) -> tuple[Grid, NDArray[np.uint8]]:
        """See `codec.GridCodec`. Raises ValueError if the planes are not those of such a matrix, if a code has no
        value, or if an exponent is out of range."""
        check_planes(self, planes, columns)
        power = planes["exponents"].astype(np.int16) - (BIAS + self.bits - 1)
        if power.min() < LOWEST or power.max() > HIGHEST:
            raise ValueError(f"An exponent of {self.name} is out of its range.")
        codes = unpack_bits(planes["codes"], self.bits, columns)
        if int(codes.max()) >= self.level_count:
            raise ValueError(f"A code of {self.name} has no value.")
        supers = np.ldexp(np.float32(1), power)
        return Grid(columns, self.levels, Scales(self.scale, supers, np.ones(supers.shape, np.int16))), codes

    def decode(self, planes: Planes, columns: int) -> NDArray[np.float32]:
        """See `codec.Codec`."""
        grid, codes = self.unpack(planes, columns)
        return grid.values(codes)


MXINT = tuple(MXInt(bits, group) for bits in BITS for group in GROUPS)
