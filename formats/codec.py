"""The contract that every format keeps: which values it can store (a `Grid`) and what its bytes mean (a `Codec`).

A stored weight is always

    value = scale * level[code] + offset          (float32, one rounding per operation, in this order)

with `level` either shared by the whole format (integers low..high, or a fixed codebook) or a table per row,
and `scale` and `offset` shared by `group` consecutive columns of a row. How a file stores a scale or an offset
is a `ScaleFormat`; the stored numbers themselves are `Scales`. A `Grid` is built from stored numbers only, so
whoever solves inside a grid solves inside exactly what the file can hold.

The law of every codec, tested for all of them: `decode(encode(grid, codes))` equals `grid.values(codes)` bitwise,
and `decode` is the definition of the format.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Planes = dict[str, np.ndarray]
"""The packed bytes of one tensor: plane name to array. The first axis of every plane is the tensor's rows, so moving
rows of a packed tensor (the rope permutation of GGUF) is `plane[order]`; only a `SectionedCodec` has it otherwise."""


@dataclass(frozen=True)
class ScaleFormat:
    """How a file stores one number per group of columns: `sign * float16 * integer`.

    group   columns of a row that share the number (0: the whole row)
    span    groups that share one float16 (a superblock holds `span` groups)
    low, high   range of the integer that each group stores; `low == high == 1` where the float16 is the number itself
    sign    -1 where the format subtracts what it stores (the mins of K-quants)
    power   whether the float16 must be a power of two, of which the format stores the exponent alone
    """

    group: int
    span: int = 1
    low: int = 1
    high: int = 1
    sign: int = 1
    power: bool = False

    @property
    def two_level(self) -> bool:
        """Whether a group stores an integer under a shared float16."""
        return self.low != self.high

    def groups(self, columns: int) -> int:
        """Groups in a row of `columns`; raises ValueError where they do not divide it."""
        group = self.group or columns
        if columns % (group * self.span):
            raise ValueError(f"{columns} columns are not a multiple of {group * self.span}")
        return columns // group


class GroupNumbers(Protocol):
    """One number per row and group of columns, made of what the file stores."""

    @property
    def subs(self) -> NDArray[np.int16]:
        """What each row and group stores: int16 [rows, groups]."""

    def values(self) -> NDArray[np.float32]:
        """float32 [rows, groups]."""


@dataclass(frozen=True)
class Scales:
    """Numbers as a file stores them, one per row and group.

    supers   float16 [rows, groups / span]
    subs     int16 [rows, groups], within [format.low, format.high]
    """

    format: ScaleFormat
    supers: NDArray[np.float16]
    subs: NDArray[np.int16]

    def values(self) -> NDArray[np.float32]:
        """float32 [rows, groups]. Exact: 11 bits of float16 times at most 8 of the integer fit in float32."""
        supers = np.repeat(self.supers.astype(np.float32), self.format.span, axis=1)
        return np.float32(self.format.sign) * supers * self.subs.astype(np.float32)


def grouped(matrix: NDArray[np.float32], numbers: GroupNumbers) -> NDArray[np.float32]:
    """A matrix [rows, columns] as [rows, groups, columns per group], to meet `numbers.values()[..., None]`."""
    return matrix.reshape(*numbers.subs.shape, -1)


@dataclass(frozen=True)
class Grid:
    """The values that the weights of one matrix may take, all parameters already rounded as stored.

    columns  number of columns
    levels   float32, ascending: [K] shared by all rows, or [rows, K], a table per row
    scale    None where the levels are the values (a table per row)
    offset   None where the format has none; a format without an offset keeps the sign of zero
    half     whether each value is rounded to float16, as ExLlamaV2 decodes
    """

    columns: int
    levels: NDArray[np.float32]
    scale: GroupNumbers | None = None
    offset: GroupNumbers | None = None
    half: bool = field(default=False, kw_only=True)

    @property
    def uniform(self) -> bool:
        """Whether the levels are consecutive integers shared by all rows."""
        return self.levels.ndim == 1 and bool(np.all(np.diff(self.levels) == 1)) and float(self.levels[0]).is_integer()

    def values(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Decoded weights, float32 [rows, columns], for codes uint8 [rows, columns] in 0..K-1."""
        values = self.levels[codes] if self.levels.ndim == 1 else np.take_along_axis(self.levels, codes, axis=1)
        if self.scale is not None:
            values = grouped(values, self.scale) * self.scale.values()[..., None]
        if self.offset is not None:
            values = grouped(values, self.offset) + self.offset.values()[..., None]
        if self.half:
            values = values.astype(np.float16).astype(np.float32)
        return values.reshape(codes.shape)

    def nearest(self, weights: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Codes uint8 [rows, columns] of the grid values nearest to float32 [rows, columns]; a tie goes either way."""
        target = self._in_levels(weights)
        if self.uniform:
            return (np.clip(np.rint(target), self.levels[0], self.levels[-1]) - self.levels[0]).astype(np.uint8)
        middles = (self.levels[..., 1:] + self.levels[..., :-1]) / 2
        codes = np.zeros(weights.shape, dtype=np.uint8)
        for middle in np.moveaxis(middles, -1, 0):
            codes += target > middle[..., None]
        return codes

    def _in_levels(self, weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """`(weights - offset) / scale`, float32 [rows, columns]; 0 where the scale is 0 and every level gives 0."""
        target = weights
        if self.offset is not None:
            target = grouped(target, self.offset) - self.offset.values()[..., None]
        if self.scale is not None:
            scale = self.scale.values()[..., None]
            scale[scale == 0] = np.inf
            with np.errstate(over="ignore"):  # an infinite quotient becomes the first or last level
                target = grouped(target, self.scale) / scale
        return target.reshape(weights.shape)


@dataclass(frozen=True)
class Run:
    """`count` groups of `group` columns each, in codes of `bits` bits."""

    bits: int
    group: int
    count: int

    @property
    def columns(self) -> int:
        return self.group * self.count


@dataclass(frozen=True)
class Sections:
    """The values that the weights of one matrix may take where its columns, in another order, fall into runs that have
    a grid each.

    order   int64 [columns]: stored column k is the matrix's column order[k]
    grids   of consecutive stored columns
    """

    order: NDArray[np.int64]
    grids: tuple[Grid, ...]

    @property
    def columns(self) -> int:
        return len(self.order)

    def values(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Decoded weights, float32 [rows, columns], for codes uint8 [rows, columns], both in the matrix's order."""
        values = np.empty(codes.shape, np.float32)
        for columns, grid in self.runs():
            values[:, columns] = grid.values(codes[:, columns])
        return values

    def nearest(self, weights: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Codes uint8 [rows, columns] of the values nearest to float32 [rows, columns]; a tie goes either way."""
        codes = np.empty(weights.shape, np.uint8)
        for columns, grid in self.runs():
            codes[:, columns] = grid.nearest(weights[:, columns])
        return codes

    def runs(self) -> list[tuple[NDArray[np.int64], Grid]]:
        """The matrix's columns of each grid."""
        ends = np.cumsum([grid.columns for grid in self.grids])
        return list(zip(np.split(self.order, ends[:-1]), self.grids, strict=True))


class Codec(Protocol):
    """What the bytes of one format mean. Instances hold no state; `formats.registry` lists them by name."""

    name: str
    """The format's name as its own source spells it, with the family before it: `gguf:Q4_K`, `native:table-3`."""
    block: int
    """Columns must be a multiple of this."""

    def layout(self, rows: int, columns: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """dtype and shape of every plane, known before anything is solved. Raises ValueError where the format cannot
        hold the shape."""

    def decode(self, planes: Planes, columns: int) -> NDArray[np.float32]:
        """Weights, float32 [rows, columns], bitwise as the format's own source decodes them."""


@runtime_checkable
class PlainCodec(Codec, Protocol):
    """A format that stores each weight by itself (F32, F16, BF16)."""

    def encode_values(self, weights: NDArray[np.float32]) -> Planes:
        """Weights float32 [rows, columns], each rounded to nearest, ties to even.

        Raises ValueError where a finite weight would become infinite."""


@runtime_checkable
class GridCodec(Codec, Protocol):
    """A format whose weights are codes on a grid.

    levels   float32 [K], ascending, or None where each row has a table of its own
    level_count   K
    scale, offset   how the file stores them; None where the format has none
    """

    levels: NDArray[np.float32] | None
    level_count: int
    scale: ScaleFormat | None
    offset: ScaleFormat | None

    def encode(self, grid: Grid, codes: NDArray[np.uint8]) -> Planes:
        """Pack codes uint8 [rows, columns] and the stored numbers of `grid`, which must be of this format."""

    def unpack(self, planes: Planes, columns: int) -> tuple[Grid, NDArray[np.uint8]]:
        """The grid and the codes that the bytes hold; `decode` is `grid.values(codes)` of these."""


@runtime_checkable
class SectionedCodec(Codec, Protocol):
    """A format whose weights are codes on a grid per run of reordered columns. Its planes are those of its file, whose
    rows are columns of the matrix.

    reorders   whether columns are to be stored in the solver's act-order; else in their own
    """

    reorders: bool

    def encode(self, grid: Sections, codes: NDArray[np.uint8]) -> Planes:
        """Pack codes uint8 [rows, columns] and the stored numbers of `grid`, whose runs must be the codec's."""

    def unpack(self, planes: Planes, columns: int) -> tuple[Sections, NDArray[np.uint8]]:
        """The grid and the codes that the bytes hold; `decode` is `grid.values(codes)` of these."""


def bits_per_weight(codec: Codec, rows: int, columns: int) -> float:
    """Bits that the file spends on each weight of a matrix, scales and tables included."""
    return 8 * nbytes(codec, rows, columns) / (rows * columns)


def nbytes(codec: Codec, rows: int, columns: int) -> int:
    """Bytes of all planes of a matrix [rows, columns]."""
    return sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in codec.layout(rows, columns).values())
