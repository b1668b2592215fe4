"""MLX's affine formats: `mlx.core.quantize` in its mode affine.

The codes of a row are the bit stream of `formats.native`, whose bytes are taken as little-endian words of 32 bits. So a
word holds whole codes of 2, 4 and 8 bits, and codes of 3, 5 and 6 bits may lie in two words.

A scale and a bias have the dtype of the model, bfloat16 or float16. `mlx.core.dequantize` rounds to this dtype twice:
first the product of scale and code, then its sum with the bias.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lqexport.formats import bfloat16
from lqexport.formats.checks import check_grid, check_planes, check_shape
from lqexport.formats.codec import BFLOAT16, FLOAT16, Grid, GridCodec, Planes, Rounding, ScaleFormat, Scales
from lqexport.formats.native import pack_bits, unpack_bits

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
HALF_SUFFIX = "-f16"
"""The end of the name of a codec for models in float16."""
WORD = np.dtype("<u4")


def words(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """Packs codes uint8 [rows, columns] into words uint32 [rows, columns * bits / 32]."""
    return pack_bits(codes, bits).view(WORD)


def codes_of(packed: NDArray[np.uint32], bits: int, columns: int) -> NDArray[np.uint8]:
    """Unpacks words uint32 [rows, columns * bits / 32] to codes uint8 [rows, columns]."""
    return unpack_bits(np.ascontiguousarray(packed).view(np.uint8), bits, columns)


class Affine(GridCodec):
    """The codecs `mlx:B-gN`, whose scales and biases are bfloat16, and `mlx:B-gN-f16`, with float16.

    planes   weight  uint32 [rows, columns * B / 32], the codes
             scales  uint16 [rows, columns / N], the bits of bfloat16; float16 in the second
             biases  the same
    decode   scale * code + bias, with product and sum rounded to the dtype of the scales
    """

    scale: ScaleFormat
    offset: ScaleFormat
    levels: NDArray[np.float32]

    def __init__(self, bits: int, group: int, half: bool) -> None:
        """Makes the codec of group size `group`, in float16 if `half`, else in bfloat16."""
        self.bits, self.half = bits, half
        self.name = f"mlx:{bits}-g{group}{HALF_SUFFIX * half}"
        self.block = group
        self.level_count = 2**bits
        self.levels = np.arange(self.level_count, dtype=np.float32)
        self.scale = self.offset = ScaleFormat(group, floats=FLOAT16 if half else BFLOAT16)
        self.rounding = Rounding.HALF_STEPS if half else Rounding.BFLOAT_STEPS

    def layout(self, rows: int, columns: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """See `codec.Codec`. Raises ValueError if the columns are not a multiple of N."""
        check_shape(self, rows, columns)
        numbers = (np.dtype(np.float16 if self.half else np.uint16), (rows, self.scale.groups(columns)))
        return {"weight": (WORD, (rows, columns * self.bits // 32)), "scales": numbers, "biases": numbers}

    def encode(self, grid: Grid, codes: NDArray[np.uint8]) -> Planes:
        """See `codec.GridCodec`. Raises ValueError for a grid of another format."""
        check_grid(self, grid, codes)
        assert isinstance(grid.scale, Scales)  # check_grid
        assert isinstance(grid.offset, Scales)
        scales, biases = self._stored(grid.scale.supers), self._stored(grid.offset.supers)
        return {"weight": words(codes, self.bits), "scales": scales, "biases": biases}

    def unpack(self, planes: Planes, columns: int) -> tuple[Grid, NDArray[np.uint8]]:
        """See `codec.GridCodec`. Raises ValueError if the planes are not those of such a matrix."""
        check_planes(self, planes, columns)
        scale, offset = self._numbers(planes["scales"]), self._numbers(planes["biases"])
        grid = Grid(columns, self.levels, scale, offset, rounding=self.rounding)
        return grid, codes_of(planes["weight"], self.bits, columns)

    def decode(self, planes: Planes, columns: int) -> NDArray[np.float32]:
        """See `codec.Codec`."""
        grid, codes = self.unpack(planes, columns)
        return grid.values(codes)

    def _stored(self, supers: NDArray[np.floating]) -> np.ndarray:
        return supers.copy() if self.half else bfloat16.to_bits(supers)

    def _numbers(self, plane: np.ndarray) -> Scales:
        supers = plane if self.half else bfloat16.of_bits(plane)
        return Scales(self.scale, supers, np.ones(plane.shape, dtype=np.int16))


MLX = tuple(Affine(bits, group, half) for half in (False, True) for bits in BITS for group in GROUPS)
