"""GPTQ's layout: 4-bit codes, and for each row and group of columns a float16 scale and an integer zero point.

AutoGPTQ and GPTQModel write it; ExLlamaV2, vLLM and transformers read it. The file holds the transposed matrix. For K
columns (inputs), N rows (outputs) and G groups, the planes are the file's arrays:

    qweight  int32 [K / 8, N]      codes; column 8w + j is in bits 4j..4j+3 of line w
    qzeros   int32 [G, N / 8]      zero points minus one; row 8w + j is in bits 4j..4j+3 of word w
    scales   float16 [G, N]
    g_idx    int32 [K]             the group of each column

The value of a code is

    value = scale * (code - zero)

The product is rounded to float16, as readers that compute in float16 do.

Zero points are 1..15, since readers disagree about 0 and 16. Minus one, 0 does not fit into the stored 4 bits; and
`gptq_v2`, which stores zero points unchanged, cannot hold 16. Symmetric layouts have the zero point 8 everywhere.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lqexport.formats.checks import check_layout
from lqexport.formats.codec import FLOAT16, Grid, Planes, Rounding, ScaleFormat, Scales, SectionedCodec, Sections
from lqexport.formats.native import pack_bits, unpack_bits

BITS = 4
LEVELS = np.arange(2**BITS, dtype=np.float32)
GROUPS = (32, 64, 128, 0)
UNIT = 32
"""A matrix's rows and columns are multiples of this, because ExLlamaV2's kernels assume so."""
MOST_SCALE = FLOAT16.most / 2**BITS
"""The largest allowed magnitude of a scale. It keeps every value finite in float16."""


class Gptq(SectionedCodec):
    """The codec `gptq:4-gN`, or `gptq:4-row` with one group for the whole row.

    The suffix `-sym` means that all zero points are 8. The suffix `-act` means that a group has the columns that are
    neighbours in the solver's act-order, instead of consecutive columns.
    """

    def __init__(self, group: int, symmetric: bool, reorders: bool) -> None:
        """Makes the codec of group size `group`; 0 is the whole row."""
        self.group, self.symmetric, self.reorders = group, symmetric, reorders
        size = f"g{group}" if group else "row"
        self.name = f"gptq:{BITS}-{size}{'-sym' * symmetric}{'-act' * reorders}"
        self.block = group or UNIT
        low, high = (8, 8) if symmetric else (1, 15)
        self.scale = ScaleFormat(group)
        self.zero = ScaleFormat(group, low=low, high=high, sign=-1)
        """The format of the offset -zero * scale: the same float16 as the scale's, times the zero point, subtracted."""

    def layout(self, rows: int, columns: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """See `codec.Codec`. Raises ValueError if the rows are not a multiple of 32, or the columns not of the
        group size (of 32 for a whole row)."""
        if rows < 1 or rows % UNIT or columns < 1 or columns % self.block:
            raise ValueError(
                f"{self.name} holds matrices of a multiple of {UNIT} rows and of {self.block} columns, "
                f"not [{rows}, {columns}]."
            )
        groups = self.scale.groups(columns)
        return {
            "qweight": (np.dtype(np.int32), (columns // 8, rows)),
            "qzeros": (np.dtype(np.int32), (groups, rows // 8)),
            "scales": (np.dtype(np.float16), (groups, rows)),
            "g_idx": (np.dtype(np.int32), (columns,)),
        }

    def encode(self, grid: Sections, codes: NDArray[np.uint8]) -> Planes:
        """See `codec.SectionedCodec`. Raises ValueError for a grid of another format, and for one with values that are
        not finite in float16."""
        self.layout(*codes.shape)
        scales, zeros = self._checked(grid, codes)
        group_of = np.empty(grid.columns, np.int32)
        group_of[grid.order] = np.arange(grid.columns) // (self.group or grid.columns)
        if not self.reorders and np.any(group_of[1:] < group_of[:-1]):
            raise ValueError(f"The groups of {self.name} are of consecutive columns.")
        stored = np.ascontiguousarray((zeros - 1).astype(np.uint8).T)
        return {
            "qweight": np.ascontiguousarray(pack_bits(codes, BITS).view(np.int32).T),
            "qzeros": pack_bits(stored, BITS).view(np.int32),
            "scales": np.ascontiguousarray(scales.T),
            "g_idx": group_of,
        }

    def unpack(self, planes: Planes, columns: int) -> tuple[Sections, NDArray[np.uint8]]:
        """See `codec.SectionedCodec`. Within a group, the columns are in the matrix's order. Raises ValueError if the
        planes are not those of such a matrix."""
        rows = planes["scales"].shape[-1] if "scales" in planes else 0
        check_layout(self, planes, rows, columns)
        self._check_groups(planes["g_idx"])
        codes = unpack_bits(np.ascontiguousarray(planes["qweight"].T).view(np.uint8), BITS, columns)
        zeros = unpack_bits(planes["qzeros"].view(np.uint8), BITS, rows).T.astype(np.int16) + 1
        supers = np.ascontiguousarray(planes["scales"].T)
        scale, offset = Scales(self.scale, supers, np.ones_like(zeros)), Scales(self.zero, supers, zeros)
        self._check_numbers(supers, zeros)
        grid = Grid(columns, LEVELS, scale, offset, rounding=Rounding.HALF)
        return Sections(np.argsort(planes["g_idx"], kind="stable").astype(np.int64), (grid,)), codes

    def decode(self, planes: Planes, columns: int) -> NDArray[np.float32]:
        """See `codec.Codec`."""
        grid, codes = self.unpack(planes, columns)
        return grid.values(codes)

    def _checked(self, grid: Sections, codes: NDArray[np.uint8]) -> tuple[NDArray[np.float16], NDArray[np.int16]]:
        """Returns scales and zero points, [rows, groups]. Raises ValueError if the file cannot hold grid or codes."""
        columns = codes.shape[1]
        if len(grid.grids) != 1 or not np.array_equal(np.sort(grid.order), np.arange(columns)):
            raise ValueError(f"The grid is not one of {self.name}: it must be one grid for each of {columns} columns.")
        only_grid = grid.grids[0]
        scale, offset = only_grid.scale, only_grid.offset
        if not isinstance(scale, Scales) or not isinstance(offset, Scales) or only_grid.rounding != Rounding.HALF:
            raise ValueError(f"The grid is not one of {self.name}: it has other scales.")
        if (scale.format, offset.format, only_grid.levels.tolist()) != (self.scale, self.zero, LEVELS.tolist()):
            raise ValueError(f"The grid is not one of {self.name}: it has other scales or levels.")
        shape = (len(codes), self.scale.groups(columns))
        if scale.supers.shape != shape or offset.subs.shape != shape or scale.supers.dtype != np.float16:
            raise ValueError(f"The scales and zero points of {self.name} must be one per row and group, {list(shape)}.")
        if not np.array_equal(scale.supers, offset.supers):
            raise ValueError(f"The offsets of {self.name} are its zero points times the very same scales.")
        if int(codes.max()) >= len(LEVELS):
            raise ValueError(f"A code of {self.name} is too large for {BITS} bits.")
        self._check_numbers(scale.supers, offset.subs)
        return scale.supers, offset.subs

    def _check_numbers(self, scales: NDArray[np.float16], zeros: NDArray[np.int16]) -> None:
        if not np.all(np.abs(scales.astype(np.float32)) <= MOST_SCALE):
            raise ValueError(f"A scale of {self.name} is not a number, or too large for float16 weights.")
        if zeros.min() < self.zero.low or zeros.max() > self.zero.high:
            raise ValueError(f"The zero points of {self.name} must lie in {self.zero.low}..{self.zero.high}.")

    def _check_groups(self, group_of: NDArray[np.int32]) -> None:
        size = self.group or len(group_of)
        expected = np.arange(len(group_of)) // size
        if not np.array_equal(np.sort(group_of) if self.reorders else group_of, expected):
            order = "in any order" if self.reorders else "one after the other"
            raise ValueError(f"g_idx of {self.name} must give each group {size} columns, {order}.")


GPTQ = {
    codec.name: codec
    for codec in (
        Gptq(group, symmetric, reorders)
        for group in GROUPS
        for symmetric in (False, True)
        for reorders in (False, True)
        if group or not reorders  # a single group cannot be reordered
    )
}
