"""Moves an already quantized matrix to another format without changing a value, if that format's grid can hold it.

Checkpoints of other projects hold more than any codec here: scales of any dtype, zero points, and codes of 1 to 8 bits.
A value is `scale * (code - zero)`, `scale * level[code] * whole`, or an entry of the row's table. Where codes are
integers, `lift` is added to a code to get the code on the other grid, whose levels begin at `low`. The offset, if there
is one, cancels the lift:

    scale * (low + code + lift) + offset,   offset = -scale * (zero + low + lift)

All of it is exact, because float32 holds the product of an 11-bit scale and a 9-bit integer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lqexport.formats.codec import (
    FLOAT16,
    Grid,
    GridCodec,
    PlainCodec,
    Rounding,
    ScaleFormat,
    Scales,
    SectionedCodec,
    Sections,
    TrellisCodec,
)
from lqexport.formats.gptq import LEVELS, Gptq


@dataclass(frozen=True)
class AffineGrid:
    """The values `scale * (code - zero)` of a quantized matrix with R rows, C columns and G groups.

    bits      bits of a code
    scale     float32 [R, G]
    zero      int16 [R, G]
    group_of  int64 [C], the group of each column
    """

    bits: int
    scale: NDArray[np.float32]
    zero: NDArray[np.int16]
    group_of: NDArray[np.int64]

    def values(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Returns the float32 values [R, C] of codes uint8 [R, C]. They are not rounded to a reader's dtype."""
        return self.scale[:, self.group_of] * (codes - self.zero[:, self.group_of]).astype(np.float32)


@dataclass(frozen=True)
class FloatGrid:
    """The values `scale * level * whole` of a quantized matrix whose codes stand for the same levels everywhere.

    levels    float32 [K], ascending
    scale     float32 [R, G]
    group_of  int64 [C], the group of each column
    whole     a float32 for the whole matrix, by which the product of scale and level is multiplied last
    """

    levels: NDArray[np.float32]
    scale: NDArray[np.float32]
    group_of: NDArray[np.int64]
    whole: float = 1.0

    def values(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Returns the float32 values [R, C] of codes uint8 [R, C]."""
        values = self.scale[:, self.group_of] * self.levels[codes]
        return values if self.whole == 1 else values * np.float32(self.whole)


@dataclass(frozen=True)
class TableGrid:
    """The values of a quantized matrix whose rows have a table each.

    levels   float32 [R, K], each a float16, ascending
    columns  number of columns of the matrix
    """

    levels: NDArray[np.float32]
    columns: int

    def values(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Returns the float32 values [R, C] of codes uint8 [R, C]."""
        return np.take_along_axis(self.levels, codes, axis=1)


@dataclass(frozen=True)
class Move:
    """A grid of another format that holds every value of a matrix.

    grid   the other format's grid
    lift   int16 [R, C or 1], added to each code
    ranks  uint8 [K], the code that takes the place of each code of a `FloatGrid`, before the lift; None for the same
    """

    grid: Grid | Sections
    lift: NDArray[np.int16]
    ranks: NDArray[np.uint8] | None = None

    def codes(self, codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Returns the codes on the grid, uint8 [R, C], for the source's codes uint8 [R, C]."""
        ranked = codes if self.ranks is None else self.ranks[codes]
        return (ranked + self.lift).astype(np.uint8)


def move(
    source: AffineGrid | FloatGrid | TableGrid, codec: PlainCodec | GridCodec | SectionedCodec | TrellisCodec
) -> Move:
    """Returns the grid of `codec` that holds all values of `source`, whatever the codes are.

    Raises ValueError with the reason if `codec` cannot hold them.
    """
    if isinstance(codec, GridCodec) and codec.codebook is not None:
        raise ValueError(f"{codec.name} has no level for each weight alone, only the vectors of a codebook")
    if isinstance(codec, TrellisCodec):
        raise ValueError(f"{codec.name} has no levels, only walks through a trellis")
    if isinstance(source, TableGrid):
        return _move_table(source, codec)
    if isinstance(source, FloatGrid):
        return _move_floats(source, codec)
    if isinstance(codec, Gptq):
        order = np.argsort(source.group_of, kind="stable") if codec.reorders else np.arange(len(source.group_of))
        grid, lift = _move_affine(source, LEVELS, codec.scale, codec.zero, order)
        return Move(Sections(order, (Grid(len(order), LEVELS, *grid, rounding=Rounding.HALF),)), lift)
    if (
        not isinstance(codec, GridCodec)
        or codec.levels is None
        or codec.scale is None
        or not _consecutive(codec.levels)
    ):
        raise ValueError(f"{codec.name} has no scale times an integer")
    if codec.rounding != Rounding.NONE:
        raise ValueError(f"{codec.name} rounds its values to fewer bits")
    matrix_order = np.arange(len(source.group_of))
    grid, lift = _move_affine(source, codec.levels, codec.scale, codec.offset, matrix_order)
    return Move(Grid(len(matrix_order), codec.levels, *grid), lift)


def _consecutive(levels: NDArray[np.float32]) -> bool:
    return bool(np.all(np.diff(levels) == 1))


def _move_table(source: TableGrid, codec: PlainCodec | GridCodec | SectionedCodec) -> Move:
    rows, count = source.levels.shape
    if not isinstance(codec, GridCodec) or codec.levels is not None or codec.level_count < count:
        raise ValueError(f"{codec.name} has no table of {count} values per row")
    levels = np.pad(source.levels, ((0, 0), (0, codec.level_count - count)), mode="edge")
    return Move(Grid(source.columns, levels), np.zeros((rows, 1), np.int16))


def _move_floats(source: FloatGrid, codec: PlainCodec | GridCodec | SectionedCodec) -> Move:
    if not isinstance(codec, GridCodec) or codec.levels is None or codec.scale is None or codec.offset is not None:
        raise ValueError(f"{codec.name} has no scale times a level")
    ranks = np.arange(len(source.levels))
    if not np.array_equal(codec.levels, source.levels):  # equal levels may have two zeros
        ranks = np.searchsorted(codec.levels, source.levels).clip(max=len(codec.levels) - 1)
    if not np.array_equal(codec.levels[ranks], source.levels):
        raise ValueError(f"{codec.name} has no such levels")
    columns = np.arange(len(source.group_of))
    numbers, whole = source.scale[:, _stored_groups(source.group_of, codec.scale, columns)], source.whole
    if not np.isfinite(whole):
        raise ValueError("its scale for the whole matrix is not finite")
    if not codec.has_whole:
        numbers, whole = _multiplied(numbers, whole), 1.0
    scale = _scales(numbers, codec.scale, np.ones(numbers.shape, np.int16))
    lift = np.zeros((len(numbers), 1), np.int16)
    return Move(Grid(len(columns), codec.levels, scale, whole=whole), lift, ranks.astype(np.uint8))


def _multiplied(numbers: NDArray[np.float32], whole: float) -> NDArray[np.float32]:
    """Returns scales multiplied by the number for the whole matrix. Raises ValueError if a product is rounded."""
    products = (exact := numbers.astype(np.float64) * whole).astype(np.float32)
    if not np.array_equal(products, exact):
        raise ValueError("it has a scale for the whole matrix, and the type has none")
    return products


def _move_affine(
    source: AffineGrid, levels: NDArray[np.float32], scale: ScaleFormat, offset: ScaleFormat | None,
    order: NDArray[np.int64],
) -> tuple[tuple[Scales, Scales | None], NDArray[np.int16]]:  # fmt: skip
    """Returns the scale and offset of columns stored in `order`, and the lift [R, C], whose columns have the matrix's
    order."""
    base = _base(source, len(levels), offset)
    lift = base - source.zero - np.int16(levels[0])
    if lift.min() < 0 or 2**source.bits - 1 + lift.max() >= len(levels):
        raise ValueError(f"the type has too few levels for codes of {source.bits} bits with these zero points")
    groups = _stored_groups(source.group_of, scale, order)
    numbers = source.scale[:, groups]
    stored = _scales(numbers, scale, np.ones(numbers.shape, np.int16))
    if offset is None:
        return (stored, None), lift[:, source.group_of]
    base = base[:, groups]
    if offset.sign < 0:  # the offset is an integer times the scale's float16
        return (stored, _scales(numbers, offset, base)), lift[:, source.group_of]
    return (stored, _scales(0 - numbers * base, offset, np.ones(base.shape, np.int16))), lift[:, source.group_of]


def _base(source: AffineGrid, count: int, offset: ScaleFormat | None) -> NDArray[np.int16]:
    """Returns `zero + low + lift`, [R, G], on a grid of `count` levels. The offset subtracts this many scales."""
    if offset is None:
        return np.zeros_like(source.zero)
    if offset.sign < 0:
        return np.clip(source.zero, offset.low, offset.high).astype(np.int16)
    exact = FLOAT16.holds(source.scale * source.zero)
    if not exact.all() and 2 * 2**source.bits > count:
        raise ValueError("its mins, -scale * zero point, are not all float16 numbers")
    # A power of two times a float16 scale is a float16 again. A codec with twice the levels has room for that lift.
    return np.where(exact, source.zero, 2**source.bits).astype(np.int16)


def _stored_groups(
    group_of: NDArray[np.int64], scale_format: ScaleFormat, order: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Returns the source's group that each stored group of columns belongs to. Raises ValueError if it is several.

    group_of   the source's group of each column
    """
    size = scale_format.group or len(order)
    runs = group_of[order].reshape(-1, size)
    if np.any(runs != runs[:, :1]):
        if np.any(np.diff(group_of) < 0):
            raise ValueError("its groups are in act-order (g_idx): their columns do not lie together")
        raise ValueError(f"its groups are not whole groups of {size} columns")
    return runs[:, 0]


def _scales(numbers: NDArray[np.float32], scale_format: ScaleFormat, subs: NDArray[np.int16]) -> Scales:
    """Returns scales that store `numbers` with the integers `subs`. Raises ValueError if `scale_format` cannot hold
    the numbers."""
    shared = numbers.reshape(len(numbers), -1, scale_format.span)
    if np.any(shared != shared[..., :1]):
        raise ValueError(
            f"its groups have scales of their own, and here {scale_format.span * scale_format.group} columns share one"
        )
    if not scale_format.floats.holds(numbers).all():
        raise ValueError(f"its scales are not all {scale_format.floats}")
    return Scales(scale_format, shared[..., 0].astype(scale_format.dtype), subs)
