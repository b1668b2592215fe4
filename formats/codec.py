"""The contract of every format: the values that it can store (a `Grid`) and the meaning of its bytes (a `Codec`).

A stored weight is always

    value = scale * level[code] + offset          (float32, one rounding per operation, in this order)

A `Rounding` says where a format's own decoder rounds to fewer bits on the way. One format has a further number for the
whole matrix, by which the value is multiplied last (`Grid.whole`).

The levels are shared by the whole format (integers low..high, or a fixed list), or each row has a table of its own. In
some formats only certain vectors of consecutive codes may stand in a row: those of a `Codebook`. A scale and an offset
are shared by `group` consecutive columns of a row. A `ScaleFormat` says how a file stores them; `Scales` are the stored
numbers. A `Grid` is built from stored numbers only, so a solver that works inside a grid can only choose values that
the file can hold.

EXL3 is the exception: its weights have no levels, only walks through a trellis (`TrellisCodec`).

Every codec obeys one law, and a test checks all codecs: `decode(encode(grid, codes))` equals `grid.values(codes)`
bitwise (for EXL3 `walks.values()`). `decode` is the definition of the format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from lqexport.formats import bfloat16
from lqexport.formats.codebook import Codebook
from lqexport.formats.trellis import Trellis, Walks

Planes = dict[str, np.ndarray]
"""The packed bytes of one tensor: plane name to array.

The first axis of every plane is the tensor's rows, so `plane[order]` reorders the rows of a packed tensor (GGUF's rope
permutation does so). The exceptions are the plane WHOLE, and the planes of a `SectionedCodec` and a `TrellisCodec`."""

WHOLE = "whole"
"""The name of the plane that holds a matrix's `Grid.whole`, float32 [1, 1]."""


class Rounding(IntEnum):
    """How a format's decoder rounds the float32 values of a grid. Kernels take these numbers."""

    NONE = 0
    HALF = 1
    """Each value to float16, once, as ExLlamaV2's kernels do."""
    HALF_STEPS = 2
    """The product of scale and level to float16, and then its sum with the offset, as mlx.core.dequantize does."""
    BFLOAT_STEPS = 3
    """The same two to bfloat16."""

    @property
    def by_steps(self) -> bool:
        """Whether the product is rounded, too, before the offset is added."""
        return self in (Rounding.HALF_STEPS, Rounding.BFLOAT_STEPS)

    def rounded(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns float32 values rounded so. A value beyond float16 becomes infinite there."""
        if self == Rounding.NONE:
            return values
        if self == Rounding.BFLOAT_STEPS:
            return bfloat16.rounded(values)
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)


class FloatFormat(NamedTuple):
    """Floating-point numbers of few bits: the multiples of 2^(e - mantissa) between 2^e and 2^(e + 1), for every e.

    mantissa   bits after the leading one; with none, the numbers are powers of two
    lowest     the lowest e; numbers below 2^lowest are multiples of 2^(lowest - mantissa), too
    least, most   the least and the largest number; a least one above 0 says that 0 is no number
    """

    mantissa: int
    lowest: int
    least: float
    most: float

    def holds(self, numbers: NDArray[np.floating]) -> NDArray[np.bool_]:
        """Returns whether each number is one of the format."""
        wide = numbers.astype(np.float64)
        exponent = np.frexp(wide)[1] - 1  # frexp writes 2^e as 0.5 * 2^(e + 1)
        multiple = np.ldexp(wide, self.mantissa - np.maximum(exponent, self.lowest))
        return (multiple == np.rint(multiple)) & (wide >= self.least) & (wide <= self.most)

    @property
    def fitted(self) -> FloatFormat:
        """The numbers that a fit chooses from. Powers of two beyond a float16's are left out."""
        if self.mantissa:
            return self
        return FloatFormat(0, max(self.lowest, -24), max(self.least, 2.0**-24), min(self.most, 2.0**15))

    @property
    def coarse(self) -> bool:
        """Whether neighbours are so far apart that a number cannot change by a little."""
        return self.mantissa < BFLOAT16.mantissa

    def __str__(self) -> str:
        if not self.coarse:
            return f"{'float16' if self == FLOAT16 else 'bfloat16'} numbers"
        if not self.mantissa:
            return f"powers of two from 2^{self.lowest} to 2^{np.frexp(self.most)[1] - 1}"
        return f"numbers of {self.mantissa + 1} bits from 2^{self.lowest - self.mantissa} to {self.most:g}"


FLOAT16 = FloatFormat(10, -14, -65504.0, 65504.0)
"""IEEE's numbers of 16 bits, of either sign."""
BFLOAT16 = FloatFormat(7, -126, -(2 - 2.0**-7) * 2.0**127, (2 - 2.0**-7) * 2.0**127)
"""The upper halves of float32 numbers, of either sign."""


@dataclass(frozen=True)
class ScaleFormat:
    """How a file stores one number per group of columns: as `sign * float * integer`.

    group   columns of a row that share the number (0: the whole row)
    span    groups that share one float (a superblock has `span` groups)
    low, high   range of the integer that each group stores; both are 1 if the float alone is the number
    step    distance between these integers: low, low + step ... high
    sign    -1 if the format subtracts the stored number (the mins of K-quants), else 1
    floats  the floats that the file can store
    """

    group: int
    span: int = 1
    low: int = 1
    high: int = 1
    sign: int = 1
    floats: FloatFormat = FLOAT16
    step: int = 1

    @property
    def dtype(self) -> np.dtype:
        """The dtype of `Scales.supers`."""
        return np.dtype(np.float16 if self.floats == FLOAT16 else np.float32)

    @property
    def end(self) -> int:
        """The integer of the largest magnitude, the negative one of two."""
        return self.low if -self.low >= self.high else self.high

    @property
    def two_level(self) -> bool:
        """Whether each group stores an integer that multiplies a shared float."""
        return self.low != self.high

    def groups(self, columns: int) -> int:
        """Returns the number of groups in a row. Raises ValueError if whole superblocks do not fill it."""
        group = self.group or columns
        if columns % (group * self.span):
            raise ValueError(f"{columns} columns are not a multiple of {group * self.span}")
        return columns // group


class GroupNumbers(Protocol):
    """Scales or offsets: one number per row and group of columns, computed from the numbers that the file stores."""

    @property
    def subs(self) -> NDArray[np.int16]:
        """The integers that the file stores, int16 [rows, groups]."""

    def values(self) -> NDArray[np.float32]:
        """Returns the numbers, float32 [rows, groups]."""


@dataclass(frozen=True)
class Scales:
    """Scales or offsets as a file stores them, one per row and group.

    supers   format.dtype [rows, groups / span], the float of each superblock, one of `format.floats`
    subs     int16 [rows, groups], the integer of each group, within [format.low, format.high]
    """

    format: ScaleFormat
    supers: NDArray[np.floating]
    subs: NDArray[np.int16]

    def values(self) -> NDArray[np.float32]:
        """Returns the numbers, float32 [rows, groups], exactly: float32 holds the product of the float16's 11 bits and
        the integer's at most 8 bits."""
        supers = np.repeat(self.supers.astype(np.float32), self.format.span, axis=1)
        return np.float32(self.format.sign) * supers * self.subs.astype(np.float32)


def grouped(matrix: NDArray[np.float32], numbers: GroupNumbers) -> NDArray[np.float32]:
    """Reshapes a matrix [rows, columns] to [rows, groups, columns per group], so that `numbers.values()[..., None]`
    broadcasts against it."""
    return matrix.reshape(*numbers.subs.shape, -1)


@dataclass(frozen=True)
class Grid:
    """The values that the weights of one matrix may take. All parameters are already rounded as the file stores them.

    columns  number of columns
    levels   float32, ascending: [K] shared by all rows, or [rows, K], a table per row
    scale    None if the levels are the values (a table per row)
    offset   None if the format has no offset; such a format keeps the sign of zero
    rounding how the format's decoder rounds the values
    codebook   which vectors of codes may stand in a row; None if any codes may
    whole    a float32 by which every value is multiplied, rounded once; 1 in formats that do not store one
    """

    columns: int
    levels: NDArray[np.float32]
    scale: GroupNumbers | None = None
    offset: GroupNumbers | None = None
    rounding: Rounding = field(default=Rounding.NONE, kw_only=True)
    codebook: Codebook | None = field(default=None, kw_only=True)
    whole: float = field(default=1.0, kw_only=True)

    @property
    def uniform(self) -> bool:
        """Whether the levels are consecutive integers shared by all rows."""
        return self.levels.ndim == 1 and bool(np.all(np.diff(self.levels) == 1)) and float(self.levels[0]).is_integer()

    def values(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Returns the decoded weights, float32 [rows, columns], of codes uint8 [rows, columns] in 0..K-1."""
        values = self.levels[codes] if self.levels.ndim == 1 else np.take_along_axis(self.levels, codes, axis=1)
        if self.scale is not None:
            values = grouped(values, self.scale) * self.scale.values()[..., None]
        if self.rounding.by_steps:
            values = self.rounding.rounded(values)
        if self.offset is not None:
            values = grouped(values, self.offset) + self.offset.values()[..., None]
        values = self.rounding.rounded(values).reshape(codes.shape)
        return values if self.whole == 1 else values * np.float32(self.whole)

    def nearest(self, weights: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Returns the codes, uint8 [rows, columns], of the grid values nearest to weights float32 [rows, columns].

        Either neighbour may be taken on a tie. With a codebook, the vectors are nearest, in units of the scales.
        """
        target = self._in_levels(weights)
        if self.codebook is not None:
            return self.codebook.nearest(target, self.levels).reshape(weights.shape)
        if self.uniform:
            return (np.clip(np.rint(target), self.levels[0], self.levels[-1]) - self.levels[0]).astype(np.uint8)
        middles = (self.levels[..., 1:] + self.levels[..., :-1]) / 2
        codes = np.zeros(weights.shape, dtype=np.uint8)
        for middle in np.moveaxis(middles, -1, 0):
            codes += target > middle[..., None]
        return codes

    def _in_levels(self, weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns `(weights / whole - offset) / scale`, float32 [rows, columns]. It is 0 where the scale is 0, because
        every level gives the same value there."""
        target = weights if self.whole == 1 else weights / np.float32(self.whole)
        if self.offset is not None:
            target = grouped(target, self.offset) - self.offset.values()[..., None]
        if self.scale is not None:
            scale = self.scale.values()[..., None]
            scale[scale == 0] = np.inf
            with np.errstate(over="ignore"):  # an infinite quotient selects the first or last level
                target = grouped(target, self.scale) / scale
        return target.reshape(weights.shape)


@dataclass(frozen=True)
class Run:
    """Consecutive stored columns: `count` groups of `group` columns each, with codes of `bits` bits."""

    bits: int
    group: int
    count: int

    @property
    def columns(self) -> int:
        return self.group * self.count


@dataclass(frozen=True)
class Sections:
    """The values that the weights of one matrix may take if its columns are reordered and each run of them has a grid.

    order   int64 [columns]: stored column k is the matrix's column order[k]
    grids   the grid of each run of consecutive stored columns
    """

    order: NDArray[np.int64]
    grids: tuple[Grid, ...]

    @property
    def columns(self) -> int:
        return len(self.order)

    def values(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Returns the decoded weights, float32 [rows, columns], of codes uint8 [rows, columns]. Both keep the
        matrix's column order."""
        values = np.empty(codes.shape, np.float32)
        for columns, grid in self.runs():
            values[:, columns] = grid.values(codes[:, columns])
        return values

    def nearest(self, weights: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Returns the codes, uint8 [rows, columns], of the values nearest to weights float32 [rows, columns].

        Either neighbour may be taken on a tie.
        """
        codes = np.empty(weights.shape, np.uint8)
        for columns, grid in self.runs():
            codes[:, columns] = grid.nearest(weights[:, columns])
        return codes

    def runs(self) -> list[tuple[NDArray[np.int64], Grid]]:
        """Returns each grid with the matrix's columns that it covers, as (columns, grid)."""
        ends = np.cumsum([grid.columns for grid in self.grids])
        return list(zip(np.split(self.order, ends[:-1]), self.grids, strict=True))


class Codec(Protocol):
    """The meaning of one format's bytes. Instances hold no state; `formats.registry` lists them by name."""

    name: str
    """The family and the name that the format's own source uses: `gguf:Q4_K`, `native:table-3`."""
    block: int
    """The number of columns must be a multiple of this."""

    def layout(self, rows: int, columns: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Returns the dtype and shape of every plane of a matrix [rows, columns].

        They depend on the shape alone, so they are known before anything is solved. Raises ValueError if the format
        cannot hold such a matrix.
        """

    def decode(self, planes: Planes, columns: int) -> NDArray[np.float32]:
        """Returns the weights, float32 [rows, columns], bitwise equal to those of the format's own decoder."""


@runtime_checkable
class PlainCodec(Codec, Protocol):
    """A format that stores each weight by itself (F32, F16, BF16)."""

    def encode_values(self, weights: NDArray[np.float32]) -> Planes:
        """Packs weights float32 [rows, columns]. Each is rounded to nearest, ties to even.

        Raises ValueError if a finite weight would become infinite.
        """


@runtime_checkable
class GridCodec(Codec, Protocol):
    """A format whose weights are codes on a grid.

    levels   float32 [K], ascending, or None if each row has a table of its own
    level_count   K
    scale, offset   how the file stores the scales and offsets; None if the format has none
    rounding   how the format's decoder rounds
    codebook   which vectors of codes may stand in a row; None if any codes may
    has_whole  whether the file stores `Grid.whole`
    """

    levels: NDArray[np.float32] | None
    level_count: int
    scale: ScaleFormat | None
    offset: ScaleFormat | None
    rounding: Rounding = Rounding.NONE
    has_whole: bool = False

    @property
    def codebook(self) -> Codebook | None:
        return None

    def encode(self, grid: Grid, codes: NDArray[np.uint8]) -> Planes:
        """Packs codes uint8 [rows, columns] and the stored numbers of `grid`, which must be of this format.

        Raises ValueError if the format cannot store them exactly.
        """

    def unpack(self, planes: Planes, columns: int) -> tuple[Grid, NDArray[np.uint8]]:
        """Returns the grid and the codes that the bytes hold. `decode` returns `grid.values(codes)` of them."""


@runtime_checkable
class SectionedCodec(Codec, Protocol):
    """A format that reorders a matrix's columns and has a grid for each run of them.

    Its planes are the arrays of its file, in which the matrix is transposed.

    reorders   whether columns are stored in the solver's act-order; if not, they keep the matrix's order
    """

    reorders: bool

    def encode(self, grid: Sections, codes: NDArray[np.uint8]) -> Planes:
        """Packs codes uint8 [rows, columns] and the stored numbers of `grid`, whose runs must be the codec's.

        Raises ValueError if the format cannot store them exactly.
        """

    def unpack(self, planes: Planes, columns: int) -> tuple[Sections, NDArray[np.uint8]]:
        """Returns the grid and the codes that the bytes hold. `decode` returns `grid.values(codes)` of them."""


@runtime_checkable
class TrellisCodec(Codec, Protocol):
    """A format in which a code stands for a weight only together with its neighbours.

    Its weights have no levels of their own. A tile of them is a walk through a trellis, and the whole matrix is rotated
    and scaled before that. It has no `Grid`: `Walks` are what a file stores. Its planes are the arrays of its file, in
    which the matrix is transposed.

    trellis   which walks there are
    """

    trellis: Trellis

    def encode(self, walks: Walks) -> Planes:
        """Packs the walks and scales of a matrix.

        Raises ValueError if the format cannot store them exactly.
        """

    def unpack(self, planes: Planes, columns: int) -> Walks:
        """Returns what the bytes hold. `decode` returns the `values()` of it."""


def bits_per_weight(codec: Codec, rows: int, columns: int) -> float:
    """Returns the file's bits per weight of a matrix [rows, columns], scales and tables included."""
    return 8 * nbytes(codec, rows, columns) / (rows * columns)


def nbytes(codec: Codec, rows: int, columns: int) -> int:
    """Returns the number of bytes of all planes of a matrix [rows, columns]."""
    return sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in codec.layout(rows, columns).values())


def joined_planes(runs: Sequence[Planes], axis: int = 0) -> Planes:
    """Returns the planes of a matrix from those of its runs of rows, or of columns if `axis` is 1."""
    return {
        plane: first if plane == WHOLE else np.concatenate([run[plane] for run in runs], axis)
        for plane, first in runs[0].items()
    }
