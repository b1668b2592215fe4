"""Reads GPTQ and AWQ checkpoints as sources.

For R rows, C columns, G groups and B bits, with little-endian words, the formats are

    GPTQ   qweight int32 [C * B / 32, R], each column one bit stream
           qzeros int32 [G, R * B / 32], each line one bit stream of zero points; they are stored less one, unless
           checkpoint_format is gptq_v2
           scales [G, R]
           g_idx int32 [C], the group of each column
    AWQ    qweight int32 [C, R / 8], qzeros int32 [G, R / 8], scales [G, R]; a word holds eight rows, whose nibbles,
           lowest first, are rows 0 2 4 6 1 3 5 7 of the eight (AutoAWQ's GEMM version)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lqexport.converters.checkpoints.layout import FLOATS, CheckpointLayout, Codes, size_name, streams
from lqexport.errors import UserError
from lqexport.formats.moves import AffineGrid

AWQ_ROWS = (0, 2, 4, 6, 1, 3, 5, 7)
"""The row, of a word's eight, that each of its nibbles holds."""


class _Transposed(CheckpointLayout):
    """The base of both layouts: the first axis of a stored tensor is the columns or groups."""

    mark = "qweight"

    def scales(self, module: str) -> NDArray[np.float32]:
        """Returns the scales, float32 [R, G]."""
        name = f"{module}.scales"
        return self.checked_tensor(name, self.matrix(name), FLOATS).float().numpy().T


class Gptq(_Transposed):
    """GPTQ's layout, with any bits and group size, in act-order or not."""

    container = "GPTQ folder"
    parts = ("qweight", "qzeros", "scales", "g_idx")

    def check(self) -> None:
        form = self.quantization.get("checkpoint_format") or self.quantization.get("format") or "gptq"
        if form not in ("gptq", "gptq_v2"):
            raise UserError(f"This GPTQ checkpoint is in the format {form}; gptq and gptq_v2 are read.")
        self._stored_less = np.int16(form == "gptq")

    def _width(self, module: str) -> int:
        return self.bits(f"{module}.qzeros", self.matrix(f"{module}.qzeros")[1], self.matrix(f"{module}.scales")[1])

    def quantization_name(self, module: str) -> str:
        groups, _ = self.matrix(f"{module}.scales")
        columns = self.shape(module)[1]
        reorders = np.any(np.diff(self.group_of(f"{module}.g_idx", columns, groups)) < 0)
        ending = "-sym" * bool(self.quantization.get("sym")) + "-act" * bool(reorders)
        return f"gptq:{self._width(module)}-{size_name(columns, groups)}{ending}"

    def shape(self, module: str) -> tuple[int, int]:
        words, rows = self.matrix(f"{module}.qweight")
        return rows, 32 * words // self._width(module)

    def grid(self, module: str) -> AffineGrid:
        bits, (rows, columns), scales = self._width(module), self.shape(module), self.scales(module)
        groups = scales.shape[1]
        words = self.words(f"{module}.qzeros", (groups, rows * bits // 32))
        zeros = self._zeros(module, streams(words, bits, rows).T.astype(np.int16), 2 ** (bits - 1))
        return AffineGrid(bits, scales, zeros, self.group_of(f"{module}.g_idx", columns, groups))

    def _zeros(self, module: str, stored: NDArray[np.int16], middle: int) -> NDArray[np.int16]:
        """Returns the zero points int16 [R, G] of the stored ones.

        The zero points of symmetric codes are all `middle`, whatever checkpoint_format says: not every tool states
        rightly whether it stores them less one. Raises UserError if they are stored in neither way.
        """
        if not self.quantization.get("sym"):
            return stored + self._stored_less
        if np.all(stored == middle - 1) or np.all(stored == middle):
            return np.full_like(stored, middle)
        raise UserError(f"{module}.qzeros are not all {middle}, though the checkpoint says that it is symmetric.")

    def codes(self, module: str) -> Codes:
        bits, (rows, columns) = self._width(module), self.shape(module)
        return streams(self.words(f"{module}.qweight", (columns * bits // 32, rows)).T, bits, columns)


class Awq(_Transposed):
    """AutoAWQ's layout for its GEMM kernels: 4 bits."""

    container = "AWQ folder"
    parts = ("qweight", "qzeros", "scales")

    def check(self) -> None:
        version, bits = str(self.quantization.get("version", "gemm")).lower(), self.quantization.get("bits")
        if (version, bits) != ("gemm", 4):
            raise UserError(f"This AWQ checkpoint is of version {version} and {bits} bits; gemm of 4 bits is read.")

    def quantization_name(self, module: str) -> str:
        return f"awq:4-{size_name(self.shape(module)[1], self.matrix(f'{module}.scales')[0])}"

    def shape(self, module: str) -> tuple[int, int]:
        columns, words = self.matrix(f"{module}.qweight")
        return 8 * words, columns

    def grid(self, module: str) -> AffineGrid:
        (rows, columns), scales = self.shape(module), self.scales(module)
        groups = scales.shape[1]
        zeros = _nibbles(self.words(f"{module}.qzeros", (groups, rows // 8)))
        return AffineGrid(4, scales, zeros.T.astype(np.int16), self.group_of(f"{module}.g_idx", columns, groups))

    def codes(self, module: str) -> Codes:
        rows, columns = self.shape(module)
        return np.ascontiguousarray(_nibbles(self.words(f"{module}.qweight", (columns, rows // 8))).T)


def _nibbles(words: NDArray[np.int32]) -> Codes:
    """Returns AWQ's integers uint8 [lines, R] from words [lines, R / 8]."""
    lines, count = words.shape
    stored = streams(words, 4, 8 * count).reshape(lines, count, 8)
    integers = np.empty_like(stored)
    integers[..., AWQ_ROWS] = stored
    return integers.reshape(lines, 8 * count)
