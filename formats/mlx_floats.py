"""MLX's formats of small floating-point numbers: `mlx.core.quantize` in the modes mxfp4, nvfp4 and mxfp8.

A stored code has its sign in the highest bit and a magnitude in the others. A group of columns has a scale of one byte:
an exponent (E8M0) in mxfp4 and mxfp8, a floating-point number (E4M3) in nvfp4. `mlx.core.dequantize` multiplies in
bfloat16 unless it is asked for another dtype; only products next to 0 are rounded there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lqexport.formats.checks import check_grid, check_planes, check_shape
from lqexport.formats.codec import FloatFormat, Grid, GridCodec, Planes, Rounding, ScaleFormat, Scales
from lqexport.formats.mlx import WORD, codes_of, words

E2M1_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
"""The magnitudes of a number of 4 bits."""
POWERS = FloatFormat(0, -127, 2.0**-127, 2.0**127)
SMALL = FloatFormat(3, -6, -448.0, 448.0)


def _e4m3_magnitudes() -> NDArray[np.float32]:
    """Returns the magnitudes of the bytes 0 to 126 as numbers of 8 bits, up to 448; the byte 127 is not a number."""
    byte = np.arange(127)
    exponent, fraction = byte >> 3, byte & 7
    whole = fraction + 8 * (exponent > 0)  # those of the exponent 0 are subnormal
    return np.ldexp(whole, exponent.clip(1) - 10).astype(np.float32)


E4M3_MAGNITUDES = _e4m3_magnitudes()


class SmallFloats(GridCodec):
    """The codecs `mlx:mxfp4`, `mlx:nvfp4` and `mlx:mxfp8`.

    planes   weight  uint32 [rows, columns * B / 32], the codes, a bit stream as in `formats.mlx`
             scales  uint8 [rows, columns / N]
    decode   scale * number, rounded to bfloat16
    """

    offset = None
    scale: ScaleFormat
    levels: NDArray[np.float32]

    def __init__(self, mode: str, bits: int, group: int, magnitudes: NDArray[np.float32], floats: FloatFormat) -> None:
        """Makes the codec of a mode of `mlx.core.quantize`.

        magnitudes   the numbers of the codes without a sign, ascending; higher codes are not numbers
        floats       the scales that a byte can hold
        """
        self.mode, self.bits, self.magnitudes = mode, bits, magnitudes
        self.name = f"mlx:{mode}"
        self.block = group
        self.level_count = 2 * len(magnitudes)
        self.levels = np.concatenate([-magnitudes[::-1], magnitudes])
        self.scale = ScaleFormat(group, floats=floats)
        self.rounding = Rounding.BFLOAT_STEPS

    def layout(self, rows: int, columns: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """See `codec.Codec`. Raises ValueError if the columns are not a multiple of N."""
        check_shape(self, rows, columns)
        scales = (np.dtype(np.uint8), (rows, self.scale.groups(columns)))
        return {"weight": (WORD, (rows, columns * self.bits // 32)), "scales": scales}

    def encode(self, grid: Grid, codes: NDArray[np.uint8]) -> Planes:
        """See `codec.GridCodec`. Raises ValueError for a grid of another format."""
        check_grid(self, grid, codes)
        assert isinstance(grid.scale, Scales)  # check_grid
        count = len(self.magnitudes)
        signed = np.where(codes < count, count - 1 - codes + 2 ** (self.bits - 1), codes - count)
        return {"weight": words(signed.astype(np.uint8), self.bits), "scales": self._bytes(grid.scale.supers)}

    def unpack(self, planes: Planes, columns: int) -> tuple[Grid, NDArray[np.uint8]]:
        """See `codec.GridCodec`. Raises ValueError if the planes are not those of such a matrix, or if a code or a
        scale is not a number."""
        check_planes(self, planes, columns)
        stored = codes_of(planes["weight"], self.bits, columns).astype(np.int16)
        count, sign = len(self.magnitudes), 2 ** (self.bits - 1)
        negative, magnitude = stored >= sign, stored % sign
        if int(magnitude.max()) >= count:
            raise ValueError(f"A code of {self.name} is not a number.")
        codes = np.where(negative, count - 1 - magnitude, count + magnitude).astype(np.uint8)
        supers = self._numbers(planes["scales"])
        scale = Scales(self.scale, supers, np.ones(supers.shape, np.int16))
        return Grid(columns, self.levels, scale, rounding=self.rounding), codes

    def decode(self, planes: Planes, columns: int) -> NDArray[np.float32]:
        """See `codec.Codec`."""
        grid, codes = self.unpack(planes, columns)
        return grid.values(codes)

    def _bytes(self, supers: NDArray[np.floating]) -> NDArray[np.uint8]:
        if self.scale.floats == POWERS:
            return (np.frexp(supers)[1] + 126).astype(np.uint8)  # frexp writes 2^k as 0.5 * 2^(k + 1)
        return (np.searchsorted(E4M3_MAGNITUDES, np.abs(supers)) + 128 * np.signbit(supers)).astype(np.uint8)

    def _numbers(self, plane: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Returns the scales that bytes stand for. Raises ValueError if one is infinite or not a number."""
        powers = self.scale.floats == POWERS
        if int(plane.max()) == 255 or (not powers and int((plane % 128).max()) == 127):
            raise ValueError(f"A scale of {self.name} is not a number.")
        if powers:
            return np.ldexp(np.float32(1), plane.astype(np.int32) - 127)
        return np.where(plane < 128, E4M3_MAGNITUDES[plane % 128], -E4M3_MAGNITUDES[plane % 128])


MLX_FLOATS = (
    SmallFloats("mxfp4", 4, 32, E2M1_MAGNITUDES, POWERS),
    SmallFloats("nvfp4", 4, 16, E2M1_MAGNITUDES, SMALL),
    SmallFloats("mxfp8", 8, 32, E4M3_MAGNITUDES, POWERS),
)
