"""EXL2, the format of ExLlamaV2. It reorders a matrix's input columns and divides them into groups of 2 to 8 bits.

A code has 2, 3, 4, 5, 6 or 8 bits. The file holds the transposed matrix. For K columns (inputs), N rows (outputs) and G
groups, the planes are the file's arrays:

    q_weight     int32 [sum over groups of columns * bits / 32, N]   codes
    q_scale      int32 [G, N / 8]      4-bit scale codes s; row 8w + j is in bits 4j..4j+3 of word w
    q_scale_max  float16 [G]           M, the group's maximum, shared by all rows
    q_groups     int16 [2 G]           each group's bits and its first line in q_weight
    q_invperm    int32 [K]             the position at which each column is stored

The codes of one row in one group are a bit stream, least significant bit first. It runs down the row's column of
q_weight. The value of a code is

    value = (code - 2^(bits-1)) * ((s + 1)^2 * (M / 256))

Every operation is rounded to float16, as ExLlamaV2's kernels do.

ExLlamaV2 loads some files without complaint and decodes them wrongly. This codec refuses them: groups whose bits rise,
groups or matrices that are not a multiple of 32, more lines than int16 can count, and more columns than uint16 can
count.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
from numpy.typing import NDArray

from lqexport.formats.checks import check_layout
from lqexport.formats.codec import Grid, Planes, Rounding, Run, SectionedCodec, Sections
from lqexport.formats.native import pack_bits, unpack_bits

BITS = (2, 3, 4, 5, 6, 8)
UNIT = 32
"""A group's columns and a matrix's rows are multiples of this, because ExLlamaV2's kernels assume so."""
MOST_LINES = 2**15 - 1
"""The most lines of q_weight: q_groups counts them in int16."""
MOST_COLUMNS = 2**16 - 1
"""The most columns of a matrix: ExLlamaV2 counts them in uint16."""
STEPS = np.arange(1, 17, dtype=np.float32) ** 2
"""(s + 1)^2 for each scale code s. A scale is this factor times the group's maximum / 256."""


def levels(bits: int) -> NDArray[np.float32]:
    """Returns the integers -2^(bits-1) .. 2^(bits-1) - 1 as float32."""
    return np.arange(2**bits, dtype=np.float32) - 2 ** (bits - 1)


@dataclass(frozen=True)
class SquaredScales:
    """Scales as EXL2 stores them.

    maxima   float16 [groups], each group's maximum M, shared by all rows
    subs     int16 [rows, groups], the scale codes s in 0..15
    """

    maxima: NDArray[np.float16]
    subs: NDArray[np.int16]

    def values(self) -> NDArray[np.float32]:
        """Returns the scales, float32 [rows, groups], each a float16.

        M / 256 is rounded to float16 first. It is subnormal if M is below 2^-6.
        """
        small = (self.maxima.astype(np.float32) / 256).astype(np.float16).astype(np.float32)
        with np.errstate(over="ignore"):  # `_check_scale` refuses an infinite M
            return (STEPS[self.subs] * small).astype(np.float16).astype(np.float32)


def name_of(runs: tuple[Run, ...]) -> str:
    """Returns the format's name. `exl2:8g32x1+4g128x5` has one group of 32 columns at 8 bits, then five groups of 128
    columns at 4 bits."""
    return "exl2:" + "+".join(f"{run.bits}g{run.group}x{run.count}" for run in runs)


def runs_named(name: str) -> tuple[Run, ...]:
    """Returns the runs that a name of `name_of` lists. Raises ValueError for any other name."""
    if not re.fullmatch(r"exl2:\d+g\d+x\d+(\+\d+g\d+x\d+)*", name):
        raise ValueError(f"{name!r} is not a format of EXL2; such as exl2:8g32x1+4g128x5 are.")
    return tuple(Run(*map(int, re.split("[gx]", run))) for run in name.removeprefix("exl2:").split("+"))


def joined(runs: list[Run]) -> tuple[Run, ...]:
    """Returns the runs without empty ones, and with neighbours of equal bits and group size joined. This makes their
    name unique."""
    equal_runs = groupby((run for run in runs if run.count), key=lambda run: (run.bits, run.group))
    return tuple(Run(bits, group, sum(run.count for run in same)) for (bits, group), same in equal_runs)


class Exl2(SectionedCodec):
    """The codec `exl2:BITSgGROUPxCOUNT+...`. The name lists the runs of one matrix, so it fixes the columns."""

    block = UNIT
    reorders = True

    def __init__(self, runs: tuple[Run, ...]) -> None:
        """Raises ValueError for runs that ExLlamaV2 decodes wrongly."""
        _check_runs(runs)
        self.runs = runs
        self.name = name_of(runs)
        self.columns = sum(run.columns for run in runs)
        self.groups = sum(run.count for run in runs)

    def layout(self, rows: int, columns: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """See `codec.Codec`. Raises ValueError if the rows are not a multiple of 32 or the columns are not
        the name's."""
        if rows < 1 or rows % UNIT:
            raise ValueError(f"EXL2 holds matrices of a multiple of {UNIT} rows (outputs), not {rows}.")
        if columns != self.columns:
            raise ValueError(f"{self.name} holds {self.columns} columns, not {columns}.")
        return {
            "q_weight": (np.dtype(np.int32), (sum(run.columns * run.bits // 32 for run in self.runs), rows)),
            "q_scale": (np.dtype(np.int32), (self.groups, rows // 8)),
            "q_scale_max": (np.dtype(np.float16), (self.groups,)),
            "q_groups": (np.dtype(np.int16), (2 * self.groups,)),
            "q_invperm": (np.dtype(np.int32), (columns,)),
        }

    def encode(self, grid: Sections, codes: NDArray[np.uint8]) -> Planes:
        """See `codec.SectionedCodec`. Raises ValueError for a grid of another format, and for one with values that are
        not finite in float16."""
        self.layout(*codes.shape)
        _check_order(grid.order, self.columns)
        scales = _checked_scales(self, grid, codes)
        streams = [
            pack_bits(codes[:, columns], run.bits).view(np.int32)
            for (columns, _), run in zip(grid.runs(), self.runs, strict=True)
        ]
        subs = np.concatenate([scale.subs for scale in scales], axis=1).astype(np.uint8)
        return {
            "q_weight": np.ascontiguousarray(np.concatenate(streams, axis=1).T),
            "q_scale": pack_bits(np.ascontiguousarray(subs.T), 4).view(np.int32),
            "q_scale_max": np.concatenate([scale.maxima for scale in scales]),
            "q_groups": _group_table(self.runs),
            "q_invperm": np.argsort(grid.order).astype(np.int32),
        }

    def unpack(self, planes: Planes, columns: int) -> tuple[Sections, NDArray[np.uint8]]:
        """See `codec.SectionedCodec`. Raises ValueError if the planes are not those of such a matrix."""
        rows = _check_planes(self, planes, columns)
        order = np.argsort(planes["q_invperm"], kind="stable").astype(np.int64)
        subs = unpack_bits(planes["q_scale"].view(np.uint8), 4, rows).T.astype(np.int16)
        codes, grids, line, group = np.empty((rows, columns), np.uint8), [], 0, 0
        for run, places in zip(self.runs, np.split(order, np.cumsum([run.columns for run in self.runs])), strict=False):
            lines, groups = run.columns * run.bits // 32, slice(group, group + run.count)
            stream = np.ascontiguousarray(planes["q_weight"][line : line + lines].T).view(np.uint8)
            codes[:, places] = unpack_bits(stream, run.bits, run.columns)
            scale = SquaredScales(planes["q_scale_max"][groups], subs[:, groups])
            grids.append(Grid(run.columns, levels(run.bits), scale, rounding=Rounding.HALF))
            line, group = line + lines, group + run.count
        return Sections(order, tuple(grids)), codes

    def decode(self, planes: Planes, columns: int) -> NDArray[np.float32]:
        """See `codec.Codec`."""
        grid, codes = self.unpack(planes, columns)
        return grid.values(codes)


def of_planes(planes: Planes) -> Exl2:
    """Returns the codec of a file's planes. Raises ValueError if ExLlamaV2 would decode `q_groups` wrongly."""
    table = planes["q_groups"].astype(np.int64).reshape(-1, 2)
    ends = np.append(table[1:, 1], len(planes["q_weight"]))
    if len(table) == 0 or table[0, 1] != 0 or np.any(ends <= table[:, 1]):
        raise ValueError("q_groups must begin at line 0 and list groups one after the other.")
    if unknown_bits := sorted(set(table[:, 0].tolist()) - set(BITS)):
        raise ValueError(f"q_groups holds groups of {unknown_bits[0]} bits; EXL2 has {', '.join(map(str, BITS))}.")
    columns, remainder = np.divmod((ends - table[:, 1]) * 32, table[:, 0])
    if remainder.any():
        raise ValueError(f"Group {int(remainder.argmax())} of q_groups ends within a column.")
    runs = [Run(bits, width, 1) for bits, width in zip(table[:, 0].tolist(), columns.tolist(), strict=True)]
    return Exl2(joined(runs))


def _group_table(runs: tuple[Run, ...]) -> NDArray[np.int16]:
    bits = np.repeat([run.bits for run in runs], [run.count for run in runs])
    lines = np.repeat([run.group * run.bits // 32 for run in runs], [run.count for run in runs])
    return np.stack([bits, np.cumsum(lines) - lines], axis=1).astype(np.int16).ravel()


def _check_runs(runs: tuple[Run, ...]) -> None:
    if not runs or any(run.count < 1 or run.group < UNIT or run.group % UNIT for run in runs):
        raise ValueError(f"The groups of {name_of(runs)} must be of {UNIT} columns or a multiple of it.")
    if unknown_bits := [run.bits for run in runs if run.bits not in BITS]:
        raise ValueError(f"EXL2 has no codes of {unknown_bits[0]} bits, only of {', '.join(map(str, BITS))}.")
    if any(before.bits < after.bits for before, after in pairwise(runs)):
        raise ValueError(f"{name_of(runs)}: ExLlamaV2 decodes groups of falling bits only, and here they rise.")
    if joined(list(runs)) != runs:
        raise ValueError(f"{name_of(runs)}: neighbouring runs of equal bits and group must be one run.")
    if sum(run.columns for run in runs) > MOST_COLUMNS:
        raise ValueError(f"EXL2 holds at most {MOST_COLUMNS} columns (inputs).")
    if sum(run.columns * run.bits // 32 for run in runs) > MOST_LINES:
        raise ValueError(f"q_groups is int16, so EXL2 holds at most {MOST_LINES} lines of 32 bits per row.")


def _check_order(order: NDArray[np.int64], columns: int) -> None:
    if order.shape != (columns,) or not np.array_equal(np.sort(order), np.arange(columns)):
        raise ValueError(f"The order of EXL2's columns must hold each of 0..{columns - 1} once.")


def _checked_scales(codec: Exl2, grid: Sections, codes: NDArray[np.uint8]) -> list[SquaredScales]:
    """Returns the scales of every run. Raises ValueError if the file cannot hold the grid or the codes."""
    if len(grid.grids) != len(codec.runs):
        raise ValueError(f"The grid is not one of {codec.name}: it has {len(grid.grids)} runs.")
    scales = []
    for run, (columns, run_grid) in zip(codec.runs, grid.runs(), strict=True):
        scale = run_grid.scale
        expected = (run.columns, levels(run.bits).tolist(), None, Rounding.HALF)
        if (
            not isinstance(scale, SquaredScales)
            or (run_grid.columns, run_grid.levels.tolist(), run_grid.offset, run_grid.rounding) != expected
        ):
            raise ValueError(f"The grid is not one of {codec.name}: it differs in its run of {run.bits} bits.")
        if int(codes[:, columns].max()) >= 2**run.bits:
            raise ValueError(f"A code of {codec.name} is too large for {run.bits} bits.")
        _check_scale(codec, run, scale, len(codes))
        scales.append(scale)
    return scales


def _check_scale(codec: Exl2, run: Run, scale: SquaredScales, rows: int) -> None:
    if scale.maxima.dtype != np.float16 or scale.maxima.shape != (run.count,):
        raise ValueError(f"The maxima of {codec.name} must be float16 [{run.count}] for its run of {run.bits} bits.")
    if scale.subs.dtype != np.int16 or scale.subs.shape != (rows, run.count):
        raise ValueError(f"The scale codes of {codec.name} must be int16 [{rows}, {run.count}], one per row and group.")
    if scale.subs.min() < 0 or scale.subs.max() > 15:
        raise ValueError(f"The scale codes of {codec.name} must lie in 0..15.")
    # The largest magnitude is M * 2^(bits-1). It must be finite in float16.
    largest = np.finfo(np.float16).max / 2 ** (run.bits - 1)
    if not np.all((scale.maxima >= 0) & (scale.maxima.astype(np.float32) <= largest)):
        raise ValueError(f"A maximum of {codec.name} is negative, not a number, or too large for float16 weights.")


def _check_planes(codec: Exl2, planes: Planes, columns: int) -> int:
    """Returns the number of rows in `planes`. Raises ValueError if they do not hold a matrix of `columns` columns."""
    rows = planes["q_weight"].shape[-1] if "q_weight" in planes else 0
    check_layout(codec, planes, rows, columns)
    if not np.array_equal(planes["q_groups"], _group_table(codec.runs)):
        raise ValueError(f"q_groups does not list the groups of {codec.name}.")
    _check_order(planes["q_invperm"], columns)
    return rows
