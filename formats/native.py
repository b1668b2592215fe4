"""The project's own formats, stored in safetensors: LeanQuant's table per row, and affine codes per row or per group.

The codes of a row are a bit stream. Code j of B bits occupies bits B*j .. B*j + B-1 of the row. Bit i of the row is bit
i % 8 (0 is the least significant) of the row's byte i // 8. Zeros fill up the last byte of a row.

    3-bit codes a b c d e f g h; each bit has the name of its code, and the least significant bit is on the right:
    byte 0  ccbbbaaa    byte 1  feeedddc    byte 2  hhhgggff
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lqexport.formats.checks import check_grid, check_planes, check_shape
from lqexport.formats.codec import Grid, GridCodec, Planes, ScaleFormat, Scales

TABLE_BITS = (2, 3, 4)
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128, 0)


def row_bytes(columns: int, bits: int) -> int:
    """Returns the number of bytes of a row's bit stream."""
    return (columns * bits + 7) // 8


def pack_bits(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Packs codes uint8 [rows, columns], each below 2^bits, into bit streams uint8 [rows, row_bytes]."""
    rows, columns = codes.shape
    # Eight codes fill `bits` whole bytes, which are the low bytes of one little-endian 64-bit word.
    eights = np.pad(codes, ((0, 0), (0, -columns % 8))).reshape(rows, -1, 8)
    words = np.zeros(eights.shape[:2], dtype="<u8")
    for j in range(8):
        words |= eights[..., j].astype(np.uint64) << np.uint64(bits * j)
    stream = words[..., None].view(np.uint8)[..., :bits].reshape(rows, -1)
    return np.ascontiguousarray(stream[:, : row_bytes(columns, bits)])


def unpack_bits(stream: NDArray[np.uint8], bits: int, columns: int) -> NDArray[np.uint8]:
    """Unpacks bit streams uint8 [rows, row_bytes] to codes uint8 [rows, columns]."""
    rows, length = stream.shape
    eights = np.pad(stream, ((0, 0), (0, -length % bits))).reshape(rows, -1, bits)  # the bytes of eight codes
    words = np.zeros(eights.shape[:2], dtype="<u8")
    words[..., None].view(np.uint8)[..., :bits] = eights
    codes = np.empty((*words.shape, 8), dtype=np.uint8)
    for j in range(8):
        codes[..., j] = words >> np.uint64(bits * j)
    codes &= np.uint8(2**bits - 1)
    return np.ascontiguousarray(codes.reshape(rows, -1)[:, :columns])


class Table(GridCodec):
    """The codec `native:table-B`: each row has an ascending table of 2^B float16 values.

    planes   codes  uint8 [rows, ceil(columns * B / 8)], the bit stream above
             table  float16 [rows, 2^B], ascending
    decode   table[row, code]
    """

    block = 1
    levels = None
    scale = None
    offset = None

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.name = f"native:table-{bits}"
        self.level_count = 2**bits

    def layout(self, rows: int, columns: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """See `codec.Codec`."""
        check_shape(self, rows, columns)
        return {
            "codes": (np.dtype(np.uint8), (rows, row_bytes(columns, self.bits))),
            "table": (np.dtype(np.float16), (rows, self.level_count)),
        }

    def encode(self, grid: Grid, codes: NDArray[np.uint8]) -> Planes:
        """See `codec.GridCodec`. Raises ValueError for a grid of another format."""
        check_grid(self, grid, codes)
        return {"codes": pack_bits(codes, self.bits), "table": grid.levels.astype(np.float16)}

    def unpack(self, planes: Planes, columns: int) -> tuple[Grid, NDArray[np.uint8]]:
        """See `codec.GridCodec`. Raises ValueError if the planes are not those of such a matrix."""
        check_planes(self, planes, columns)
        grid = Grid(columns, planes["table"].astype(np.float32))
        return grid, unpack_bits(planes["codes"], self.bits, columns)

    def decode(self, planes: Planes, columns: int) -> NDArray[np.float32]:
        """See `codec.Codec`."""
        grid, codes = self.unpack(planes, columns)
        return grid.values(codes)


class Affine(GridCodec):
    """The codecs `native:affine-B-gN` and `native:affine-B-row`: unsigned B-bit codes, a float16 scale and offset.

    planes   codes   uint8 [rows, ceil(columns * B / 8)], the bit stream above
             scale   float16 [rows, columns / N], or [rows, 1] for a whole row
             offset  float16, the same shape
    decode   scale * code + offset
    """

    scale: ScaleFormat
    offset: ScaleFormat

    def __init__(self, bits: int, group: int) -> None:
        """Makes the codec of group size `group`; 0 is the whole row."""
        self.bits = bits
        self.name = f"native:affine-{bits}-{f'g{group}' if group else 'row'}"
        self.block = group or 1
        self.level_count = 2**bits
        self.levels = np.arange(self.level_count, dtype=np.float32)
        self.scale = self.offset = ScaleFormat(group)

    def layout(self, rows: int, columns: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """See `codec.Codec`. Raises ValueError if the columns are not a multiple of N."""
        check_shape(self, rows, columns)
        numbers = (np.dtype(np.float16), (rows, self.scale.groups(columns)))
        stream = (np.dtype(np.uint8), (rows, row_bytes(columns, self.bits)))
        return {"codes": stream, "scale": numbers, "offset": numbers}

    def encode(self, grid: Grid, codes: NDArray[np.uint8]) -> Planes:
        """See `codec.GridCodec`. Raises ValueError for a grid of another format."""
        check_grid(self, grid, codes)
        assert isinstance(grid.scale, Scales)  # check_grid
        assert isinstance(grid.offset, Scales)
        scale, offset = grid.scale.supers.copy(), grid.offset.supers.copy()
        return {"codes": pack_bits(codes, self.bits), "scale": scale, "offset": offset}

    def unpack(self, planes: Planes, columns: int) -> tuple[Grid, NDArray[np.uint8]]:
        """See `codec.GridCodec`. Raises ValueError if the planes are not those of such a matrix."""
        check_planes(self, planes, columns)
        scale, offset = (
            Scales(self.scale, planes[name], np.ones(planes[name].shape, dtype=np.int16))
            for name in ("scale", "offset")
        )
        return Grid(columns, self.levels, scale, offset), unpack_bits(planes["codes"], self.bits, columns)

    def decode(self, planes: Planes, columns: int) -> NDArray[np.float32]:
        """See `codec.Codec`."""
        grid, codes = self.unpack(planes, columns)
        return grid.values(codes)


NATIVE = (
    *(Table(bits) for bits in TABLE_BITS),
    *(Affine(bits, group) for bits in AFFINE_BITS for group in AFFINE_GROUPS),
)
