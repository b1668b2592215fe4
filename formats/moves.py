"""Moving a matrix that is quantized already to another format without changing a value, where its grid holds them all.

What checkpoints of others hold is wider than any codec here: scales of any dtype, zero points and codes of 1 to 8 bits.
A value is `scale * (code - zero)`, or an entry of the row's table. On the other grid a code has `lift` added, and the
offset, where there is one, makes up for it:

    scale * (low + code + lift) + offset,   offset = -scale * (zero + low + lift)

All of it is exact: a scale of 11 bits times an integer of 9 fits in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lqexport.formats.codec import Grid, GridCodec, PlainCodec, ScaleFormat, Scales, SectionedCodec, Sections
from lqexport.formats.gptq import LEVELS, Gptq


@dataclass(frozen=True)
class AffineGrid:
    """`bits` of every code; scale float32 [R, G], zero int16 [R, G], and the group of each column, int64 [C]."""

    bits: int
    scale: NDArray[np.float32]
    zero: NDArray[np.int16]
    group_of: NDArray[np.int64]

    def values(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """float32 [R, C] of codes uint8 [R, C]: the product, not rounded to what a reader may compute in."""
        return self.scale[:, self.group_of] * (codes - self.zero[:, self.group_of]).astype(np.float32)


@dataclass(frozen=True)
class TableGrid:
    """levels float32 [R, K], each a float16, ascending; `columns` of the matrix."""

    levels: NDArray[np.float32]
    columns: int

    def values(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """float32 [R, C] of codes uint8 [R, C]."""
        return np.take_along_axis(self.levels, codes, axis=1)


@dataclass(frozen=True)
class Move:
    """A grid of another format that holds every value of a matrix, and what to add to the codes: int16 [R, C or 1]."""

    grid: Grid | Sections
    lift: NDArray[np.int16]

    def codes(self, codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Codes on the grid, uint8 [R, C]."""
        return (codes + self.lift).astype(np.uint8)


def move(source: AffineGrid | TableGrid, kind: PlainCodec | GridCodec | SectionedCodec) -> Move:
    """How `kind` holds whatever codes a matrix has on `source`. Raises ValueError, saying why, where it does not."""
    if isinstance(source, TableGrid):
        return _move_table(source, kind)
    if isinstance(kind, Gptq):
        order = np.argsort(source.group_of, kind="stable") if kind.reorders else np.arange(len(source.group_of))
        grid, lift = _move_affine(source, LEVELS, kind.scale, kind.zero, order)
        return Move(Sections(order, (Grid(len(order), LEVELS, *grid, half=True),)), lift)
    if not isinstance(kind, GridCodec) or kind.levels is None or kind.scale is None or not _consecutive(kind.levels):
        raise ValueError(f"{kind.name} has no scale times an integer")
    natural = np.arange(len(source.group_of))
    grid, lift = _move_affine(source, kind.levels, kind.scale, kind.offset, natural)
    return Move(Grid(len(natural), kind.levels, *grid), lift)


def _consecutive(levels: NDArray[np.float32]) -> bool:
    return bool(np.all(np.diff(levels) == 1))


def _move_table(source: TableGrid, kind: PlainCodec | GridCodec | SectionedCodec) -> Move:
    rows, count = source.levels.shape
    if not isinstance(kind, GridCodec) or kind.levels is not None or kind.level_count < count:
        raise ValueError(f"{kind.name} has no table of {count} values per row")
    levels = np.pad(source.levels, ((0, 0), (0, kind.level_count - count)), mode="edge")
    return Move(Grid(source.columns, levels), np.zeros((rows, 1), np.int16))


def _move_affine(
    source: AffineGrid, levels: NDArray[np.float32], scale: ScaleFormat, offset: ScaleFormat | None,
    order: NDArray[np.int64],
) -> tuple[tuple[Scales, Scales | None], NDArray[np.int16]]:  # fmt: skip
    """Scale and offset of columns stored in `order`, and the lift [R, C] of columns in the matrix's own."""
    base = _base(source, len(levels), offset)
    lift = base - source.zero - np.int16(levels[0])
    if lift.min() < 0 or 2**source.bits - 1 + lift.max() >= len(levels):
        raise ValueError(f"the type has too few levels for codes of {source.bits} bits with these zero points")
    groups = _stored_groups(source, scale, order)
    numbers = source.scale[:, groups]
    stored = _scales(numbers, scale, np.ones(numbers.shape, np.int16))
    if offset is None:
        return (stored, None), lift[:, source.group_of]
    base = base[:, groups]
    if offset.sign < 0:  # an integer times the scale's own float16
        return (stored, _scales(numbers, offset, base)), lift[:, source.group_of]
    return (stored, _scales(0 - numbers * base, offset, np.ones(base.shape, np.int16))), lift[:, source.group_of]


def _base(source: AffineGrid, count: int, offset: ScaleFormat | None) -> NDArray[np.int16]:
    """`zero + low + lift` [R, G]: how many scales the offset takes away, on a grid of `count` levels."""
    if offset is None:
        return np.zeros_like(source.zero)
    if offset.sign < 0:
        return np.clip(source.zero, offset.low, offset.high).astype(np.int16)
    exact = _is_half(source.scale * source.zero)
    if not exact.all() and 2 * 2**source.bits > count:
        raise ValueError("its mins, -scale * zero point, are not all float16 numbers")
    # A power of two times a float16 is one; a wider type has levels to spare for it.
    return np.where(exact, source.zero, 2**source.bits).astype(np.int16)


def _stored_groups(source: AffineGrid, form: ScaleFormat, order: NDArray[np.int64]) -> NDArray[np.int64]:
    """The group of the matrix that each stored group of columns is of. Raises ValueError where it is of several."""
    size = form.group or len(order)
    runs = source.group_of[order].reshape(-1, size)
    if np.any(runs != runs[:, :1]):
        if np.any(np.diff(source.group_of) < 0):
            raise ValueError("its groups are in act-order (g_idx): their columns do not lie together")
        raise ValueError(f"its groups are not whole groups of {size} columns")
    return runs[:, 0]


def _scales(numbers: NDArray[np.float32], form: ScaleFormat, subs: NDArray[np.int16]) -> Scales:
    """The float16 of each superblock with integers `subs`. Raises ValueError where they do not hold the numbers."""
    shared = numbers.reshape(len(numbers), -1, form.span)
    if form.power or np.any(shared != shared[..., :1]):
        raise ValueError(f"its groups have scales of their own, and here {form.span * form.group} columns share one")
    if not _is_half(numbers).all():
        raise ValueError("its scales are not all float16 numbers")
    return Scales(form, shared[..., 0].astype(np.float16), subs)


def _is_half(numbers: NDArray[np.float32]) -> NDArray[np.bool_]:
    with np.errstate(over="ignore"):
        halves = numbers.astype(np.float16).astype(np.float32)
    return (halves == numbers) & np.isfinite(halves)
