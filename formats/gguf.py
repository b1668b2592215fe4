"""GGUF's block types, named and laid out as in llama.cpp (ggml-common.h, ggml-quants.c).

A row is a sequence of blocks, and a block is a C struct without padding. `members` is that struct, with llama.cpp's
names. So the only plane, `blocks` uint8 [rows, bytes of a row], is an array of structs [rows, blocks].

All types pack integers of less than a byte in the same way, which `Bits` describes: each `run` bytes hold 8 / bits runs
of `run` integers. The first run is in the lowest bits of those bytes, and the next run is in the bits above.

    Bits("qs", 4, 16) of Q4_0, for weights w0 .. w31, with the highest bit on the left:
    qs[0]   w16 w16 w16 w16  w0 w0 w0 w0
    qs[1]   w17 w17 w17 w17  w1 w1 w1 w1     and so on
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lqexport.formats.checks import check_grid, check_planes, check_shape, check_whole
from lqexport.formats.codec import WHOLE, FloatFormat, Grid, GridCodec, Planes, ScaleFormat, Scales

IQ4_LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)
"""The sixteen levels of IQ4_NL and IQ4_XS (`kvalues_iq4nl`)."""

E2M1 = np.array([-12, -8, -6, -4, -3, -2, -1, 0, 0, 1, 2, 3, 4, 6, 8, 12], dtype=np.float32)
"""The levels of MXFP4 and NVFP4: twice the values of a floating-point number of 4 bits (`kvalues_mxfp4`), ascending.

Its two zeros have a sign bit or none. ggml decodes both to 0."""

Subs = tuple[NDArray[np.int16], ...]
"""The stored integers of the scale and, if there is one, of the offset: each [rows, blocks, groups of a block]."""


class Bits(NamedTuple):
    """A bit field of every integer of a block: the struct's member that holds it, its bits, and integers per run."""

    member: str
    bits: int
    run: int


def spread(packed: NDArray[np.uint8], bits: int, run: int) -> NDArray[np.uint8]:
    """Unpacks bytes uint8 [..., n] to integers uint8 [..., n * 8 / bits]; `Bits` gives the order."""
    runs = packed.reshape(-1, run)
    integers = np.empty((len(runs), 8 // bits, run), dtype=np.uint8)
    for k in range(8 // bits):
        np.right_shift(runs, k * bits, out=integers[:, k])
    integers &= np.uint8(2**bits - 1)
    return integers.reshape(*packed.shape[:-1], -1)


def gather(integers: NDArray[np.uint8], bits: int, run: int) -> NDArray[np.uint8]:
    """Packs the low `bits` of integers uint8 [..., n * 8 / bits] into bytes uint8 [..., n]. It is the inverse of
    `spread`."""
    runs = integers.reshape(-1, 8 // bits, run)
    packed = np.zeros((len(runs), run), dtype=np.uint8)
    for k in range(8 // bits):
        packed |= (runs[:, k] & np.uint8(2**bits - 1)) << np.uint8(k * bits)
    return packed.reshape(*integers.shape[:-1], -1)


def read_bits(blocks: np.ndarray, fields: tuple[Bits, ...]) -> NDArray[np.uint8]:
    """Reads integers, uint8 [rows, blocks, n], whose bits are in several members. The first has the lowest bits."""
    first, *higher = fields
    integers, shift = spread(blocks[first.member], first.bits, first.run), first.bits
    for field in higher:
        integers |= spread(blocks[field.member], field.bits, field.run) << np.uint8(shift)
        shift += field.bits
    return integers


def write_bits(blocks: np.ndarray, fields: tuple[Bits, ...], integers: NDArray[np.uint8]) -> None:
    """Writes integers, uint8 [rows, blocks, n], into the members. It is the inverse of `read_bits`."""
    shift = 0
    for field in fields:
        blocks[field.member] = gather(integers >> np.uint8(shift), field.bits, field.run)
        shift += field.bits


def e2m1_ranks(stored: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns the rank among the levels `E2M1` of each stored code, a sign bit above three bits of magnitude."""
    return np.where(stored < 8, stored + np.uint8(8), np.uint8(15) - stored)


def integer_levels(low: int, high: int) -> NDArray[np.float32]:
    """Returns the integers low .. high as float32."""
    return np.arange(low, high + 1, dtype=np.float32)


class BlockType(GridCodec):
    """A block type of GGUF; its interface is `codec.GridCodec`.

    members     the block's struct
    code_bits   the bit fields that hold the codes
    supers      the members with the floats of the scale and, if there is one, of the offset
    """

    members: np.dtype
    code_bits: tuple[Bits, ...]
    supers: tuple[str, ...] = ("d",)
    levels: NDArray[np.float32]
    scale: ScaleFormat
    offset: ScaleFormat | None = None

    def __init__(self) -> None:
        self.level_count = len(self.levels)

    def layout(self, rows: int, columns: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """See `codec.Codec`. The plane is `blocks`, uint8 [rows, bytes of a row]. Raises ValueError if the columns do
        not fill whole blocks."""
        check_shape(self, rows, columns)
        return {"blocks": (np.dtype(np.uint8), (rows, columns // self.block * self.members.itemsize))}

    def encode(self, grid: Grid, codes: NDArray[np.uint8]) -> Planes:
        """See `codec.GridCodec`. Raises ValueError for a grid of another format."""
        check_grid(self, grid, codes)
        rows, columns = codes.shape
        blocks = np.zeros((rows, columns // self.block), dtype=self.members)
        self._write_codes(blocks, codes.reshape(*blocks.shape, self.block))
        stored = [scales for scales in (grid.scale, grid.offset) if isinstance(scales, Scales)]
        for member, scales in zip(self.supers, stored, strict=True):
            self._write_super(blocks, member, scales.supers)
        self._write_subs(blocks, tuple(scales.subs.reshape(*blocks.shape, -1) for scales in stored))
        return {"blocks": blocks.view(np.uint8)}

    def unpack(self, planes: Planes, columns: int) -> tuple[Grid, NDArray[np.uint8]]:
        """See `codec.GridCodec`. Raises ValueError if the plane is not that of such a matrix."""
        rows = check_planes(self, planes, columns)
        blocks = np.ascontiguousarray(planes["blocks"]).view(self.members)
        formats = [scale_format for scale_format in (self.scale, self.offset) if scale_format is not None]
        scales = [
            Scales(scale_format, self._read_super(blocks, member), subs.reshape(rows, -1))
            for scale_format, member, subs in zip(formats, self.supers, self._read_subs(blocks), strict=True)
        ]
        grid = Grid(columns, self.levels, *scales, codebook=self.codebook)
        return grid, self._read_codes(blocks).reshape(rows, columns)

    def decode(self, planes: Planes, columns: int) -> NDArray[np.float32]:
        """See `codec.Codec`."""
        grid, codes = self.unpack(planes, columns)
        return grid.values(codes)

    def _read_codes(self, blocks: np.ndarray) -> NDArray[np.uint8]:
        return read_bits(blocks, self.code_bits)

    def _write_codes(self, blocks: np.ndarray, codes: NDArray[np.uint8]) -> None:
        write_bits(blocks, self.code_bits, codes)

    def _read_super(self, blocks: np.ndarray, member: str) -> NDArray[np.floating]:
        return blocks[member].astype(np.float16)

    def _write_super(self, blocks: np.ndarray, member: str, supers: NDArray[np.floating]) -> None:
        blocks[member] = supers

    def _read_subs(self, blocks: np.ndarray) -> Subs:
        """Returns ones: the float alone is a group's number, unless a subclass says otherwise."""
        groups = self.block // self.scale.group
        return tuple(np.ones((*blocks.shape, groups), dtype=np.int16) for _ in self.supers)

    def _write_subs(self, blocks: np.ndarray, subs: Subs) -> None:
        pass


class Q4_0(BlockType):
    """32 weights, 18 bytes: d * q with q in -8..7, stored as q + 8."""

    name = "gguf:Q4_0"
    block = 32
    members = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
    code_bits = (Bits("qs", 4, 16),)
    levels = integer_levels(-8, 7)
    scale = ScaleFormat(32)


class Q4_1(BlockType):
    """32 weights, 20 bytes: d * q + m with q in 0..15."""

    name = "gguf:Q4_1"
    block = 32
    members = np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)])
    code_bits = (Bits("qs", 4, 16),)
    supers = ("d", "m")
    levels = integer_levels(0, 15)
    scale = ScaleFormat(32)
    offset = ScaleFormat(32)


class Q5_0(BlockType):
    """32 weights, 22 bytes: d * q with q in -16..15, stored as q + 16. qh has the fifth bits."""

    name = "gguf:Q5_0"
    block = 32
    members = np.dtype([("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
    code_bits = (Bits("qs", 4, 16), Bits("qh", 1, 1))
    levels = integer_levels(-16, 15)
    scale = ScaleFormat(32)


class Q5_1(BlockType):
    """32 weights, 24 bytes: d * q + m with q in 0..31. qh has the fifth bits."""

    name = "gguf:Q5_1"
    block = 32
    members = np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
    code_bits = (Bits("qs", 4, 16), Bits("qh", 1, 1))
    supers = ("d", "m")
    levels = integer_levels(0, 31)
    scale = ScaleFormat(32)
    offset = ScaleFormat(32)


class Q8_0(BlockType):
    """32 weights, 34 bytes: d * q with q in -128..127, stored as int8."""

    name = "gguf:Q8_0"
    block = 32
    members = np.dtype([("d", "<f2"), ("qs", "u1", 32)])
    levels = integer_levels(-128, 127)
    scale = ScaleFormat(32)

    def _read_codes(self, blocks: np.ndarray) -> NDArray[np.uint8]:
        return blocks["qs"] ^ np.uint8(128)  # q + 128: flip the sign bit of the int8

    def _write_codes(self, blocks: np.ndarray, codes: NDArray[np.uint8]) -> None:
        blocks["qs"] = codes ^ np.uint8(128)


class IQ4_NL(BlockType):
    """32 weights, 18 bytes: d * IQ4_LEVELS[q]."""

    name = "gguf:IQ4_NL"
    block = 32
    members = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
    code_bits = (Bits("qs", 4, 16),)
    levels = IQ4_LEVELS
    scale = ScaleFormat(32)


class IQ4_XS(BlockType):
    """256 weights, 136 bytes: d * s * IQ4_LEVELS[q] with s in -32..31 per 32 weights, stored as s + 32.

    The low 4 bits of s + 32 are in scales_l, the high 2 bits in scales_h (a little-endian uint16 in llama.cpp).
    """

    name = "gguf:IQ4_XS"
    block = 256
    members = np.dtype([("d", "<f2"), ("scales_h", "u1", 2), ("scales_l", "u1", 4), ("qs", "u1", 128)])
    code_bits = (Bits("qs", 4, 16),)
    sub_bits = (Bits("scales_l", 4, 1), Bits("scales_h", 2, 1))
    levels = IQ4_LEVELS
    scale = ScaleFormat(32, 8, -32, 31)

    def _read_subs(self, blocks: np.ndarray) -> Subs:
        return (read_bits(blocks, self.sub_bits) - np.int16(32),)

    def _write_subs(self, blocks: np.ndarray, subs: Subs) -> None:
        write_bits(blocks, self.sub_bits, (subs[0] + 32).astype(np.uint8))


class MXFP4(BlockType):
    """32 weights, 17 bytes: 2^(e - 128) * q with q in E2M1. The byte e is stored without a sign (E8M0).

    A stored code has the sign in its highest bit and the magnitude's rank in the others.
    """

    name = "gguf:MXFP4"
    block = 32
    members = np.dtype([("e", "u1"), ("qs", "u1", 16)])
    code_bits = (Bits("qs", 4, 16),)
    supers = ("e",)
    levels = E2M1
    scale = ScaleFormat(32, floats=FloatFormat(0, -128, 2.0**-128, 2.0**127))

    def _read_codes(self, blocks: np.ndarray) -> NDArray[np.uint8]:
        return e2m1_ranks(super()._read_codes(blocks))

    def _write_codes(self, blocks: np.ndarray, codes: NDArray[np.uint8]) -> None:
        super()._write_codes(blocks, np.where(codes < 8, 15 - codes, codes - 8))

    def _read_super(self, blocks: np.ndarray, member: str) -> NDArray[np.floating]:
        return np.ldexp(np.float32(1), blocks[member].astype(np.int32) - 128)

    def _write_super(self, blocks: np.ndarray, member: str, supers: NDArray[np.floating]) -> None:
        blocks[member] = np.frexp(supers)[1] + 127  # frexp writes 2^k as 0.5 * 2^(k + 1)


def _small_scales() -> NDArray[np.float32]:
    """Returns the scale of each byte of NVFP4, float32 [256]: half a float8 (E4M3, bias 7) whose sign does not count.

    The byte 127, which stands for NaN, is 0 as in llama.cpp; 255 is not.
    """
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    values = np.where(exponent, np.ldexp(mantissa + 8.0, exponent - 11), np.ldexp(mantissa * 1.0, -10))
    values[127] = 0
    return values.astype(np.float32)


class NVFP4(MXFP4):
    """64 weights, 36 bytes: s * q with q in E2M1 and s half a small float per 16 weights, stored in a byte each.

    Codes are stored as MXFP4's.
    """

    name = "gguf:NVFP4"
    block = 64
    members = np.dtype([("scales", "u1", 4), ("qs", "u1", 32)])
    code_bits = (Bits("qs", 4, 8),)
    supers = ("scales",)
    scale = ScaleFormat(16, floats=FloatFormat(3, -7, 0.0, 224.0))
    small_scales = _small_scales()

    def _read_super(self, blocks: np.ndarray, member: str) -> NDArray[np.floating]:
        return self.small_scales[blocks[member]].reshape(len(blocks), -1)

    def _write_super(self, blocks: np.ndarray, member: str, supers: NDArray[np.floating]) -> None:
        # The scales of the bytes 0 to 126 ascend, from 0 to 224.
        blocks[member] = np.searchsorted(self.small_scales[:127], supers).reshape(blocks[member].shape)


class ScaledNVFP4(NVFP4):
    """NVFP4 beside llama.cpp's further tensor `X.scale`: w * s * q with a float32 w for the whole matrix.

    planes   blocks   those of NVFP4
             whole    float32 [1, 1], w
    decode   w * (s * q), rounded once: s * q is exact in float32

    llama.cpp multiplies the product of the blocks and a linear's inputs by w.
    """

    name = "gguf-scaled:NVFP4"
    has_whole = True

    def layout(self, rows: int, columns: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """See `codec.Codec`. Raises ValueError if the columns do not fill whole blocks."""
        return super().layout(rows, columns) | {WHOLE: (np.dtype(np.float32), (1, 1))}

    def encode(self, grid: Grid, codes: NDArray[np.uint8]) -> Planes:
        """See `codec.GridCodec`. Raises ValueError for a grid of another format."""
        return super().encode(grid, codes) | {WHOLE: np.array([[grid.whole]], np.float32)}

    def unpack(self, planes: Planes, columns: int) -> tuple[Grid, NDArray[np.uint8]]:
        """See `codec.GridCodec`. Raises ValueError if the planes are not those of such a matrix, or if the float32 is
        infinite or not a number."""
        grid, codes = super().unpack(planes, columns)
        grid = replace(grid, whole=float(planes[WHOLE][0, 0]))
        check_whole(self, grid)
        return grid, codes


class Q2_K(BlockType):
    """256 weights, 84 bytes: d * s * q - dmin * m with q in 0..3, s and m in 0..15 per 16 weights.

    scales[i]   m m m m  s s s s   of group i
    """

    name = "gguf:Q2_K"
    block = 256
    members = np.dtype([("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2")])
    code_bits = (Bits("qs", 2, 32),)
    supers = ("d", "dmin")
    levels = integer_levels(0, 3)
    scale = ScaleFormat(16, 16, 0, 15)
    offset = ScaleFormat(16, 16, 0, 15, sign=-1)

    def _read_subs(self, blocks: np.ndarray) -> Subs:
        scales = blocks["scales"].astype(np.int16)
        return scales & 15, scales >> 4

    def _write_subs(self, blocks: np.ndarray, subs: Subs) -> None:
        scales, mins = subs
        blocks["scales"] = scales | mins << 4


class Q3_K(BlockType):
    """256 weights, 110 bytes: d * s * q with q in -4..3, s in -32..31 per 16 weights.

    The low 2 bits of q + 4 are in qs, and its high bit is in hmask. llama.cpp's member scales has 12 bytes, here
    divided into scales_l (the first 8, with the low 4 bits of s + 32) and scales_h (the other 4, with its high 2 bits).
    """

    name = "gguf:Q3_K"
    block = 256
    members = np.dtype(
        [("hmask", "u1", 32), ("qs", "u1", 64), ("scales_l", "u1", 8), ("scales_h", "u1", 4), ("d", "<f2")]
    )
    code_bits = (Bits("qs", 2, 32), Bits("hmask", 1, 32))
    sub_bits = (Bits("scales_l", 4, 8), Bits("scales_h", 2, 4))
    levels = integer_levels(-4, 3)
    scale = ScaleFormat(16, 16, -32, 31)

    _read_subs = IQ4_XS._read_subs
    _write_subs = IQ4_XS._write_subs


class Q4_K(BlockType):
    """256 weights, 144 bytes: d * s * q - dmin * m with q in 0..15, s and m in 0..63 per 32 weights.

    The six bits of each of s[0..7] and m[0..7] are in 12 bytes; for j in 0..3:

        scales[j]       s[j+4] bits 5 4   s[j] bits 5 4 3 2 1 0
        scales[j + 4]   m[j+4] bits 5 4   m[j] bits 5 4 3 2 1 0
        scales[j + 8]   m[j+4] bits 3 2 1 0   s[j+4] bits 3 2 1 0
    """

    name = "gguf:Q4_K"
    block = 256
    members = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", (3, 4)), ("qs", "u1", 128)])
    code_bits: tuple[Bits, ...] = (Bits("qs", 4, 32),)
    supers = ("d", "dmin")
    levels = integer_levels(0, 15)
    scale = ScaleFormat(32, 8, 0, 63)
    offset = ScaleFormat(32, 8, 0, 63, sign=-1)

    def _read_subs(self, blocks: np.ndarray) -> Subs:
        s, m, low = np.moveaxis(blocks["scales"].astype(np.int16), 2, 0)
        scales = np.concatenate([s & 63, low & 15 | s >> 6 << 4], axis=-1)
        mins = np.concatenate([m & 63, low >> 4 | m >> 6 << 4], axis=-1)
        return scales, mins

    def _write_subs(self, blocks: np.ndarray, subs: Subs) -> None:
        scales, mins = subs
        s, m = scales[..., 4:], mins[..., 4:]
        blocks["scales"][:, :, 0] = scales[..., :4] | s >> 4 << 6
        blocks["scales"][:, :, 1] = mins[..., :4] | m >> 4 << 6
        blocks["scales"][:, :, 2] = s & 15 | (m & 15) << 4


class Q5_K(Q4_K):
    """256 weights, 176 bytes: like Q4_K, but with q in 0..31. qh has the fifth bits."""

    name = "gguf:Q5_K"
    members = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", (3, 4)), ("qh", "u1", 32), ("qs", "u1", 128)])
    code_bits = (Bits("qs", 4, 32), Bits("qh", 1, 32))
    levels = integer_levels(0, 31)


class Q6_K(BlockType):
    """256 weights, 210 bytes: d * s * q with q in -32..31, stored as q + 32, and s an int8 per 16 weights."""

    name = "gguf:Q6_K"
    block = 256
    members = np.dtype([("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")])
    code_bits = (Bits("ql", 4, 64), Bits("qh", 2, 32))
    levels = integer_levels(-32, 31)
    scale = ScaleFormat(16, 16, -128, 127)

    def _read_subs(self, blocks: np.ndarray) -> Subs:
        return (blocks["scales"].astype(np.int16),)

    def _write_subs(self, blocks: np.ndarray, subs: Subs) -> None:
        blocks["scales"] = subs[0]


GGUF = (
    Q4_0(), Q4_1(), Q5_0(), Q5_1(), Q8_0(), IQ4_NL(), IQ4_XS(), MXFP4(), Q2_K(), Q3_K(), Q4_K(), Q5_K(), Q6_K(), NVFP4()
)  # fmt: skip
GGUF_SCALED = (ScaledNVFP4(),)
WITH_SCALE = {"gguf:NVFP4": "gguf-scaled:NVFP4"}
"""Codec of a type -> the codec of the type beside a further scale."""
