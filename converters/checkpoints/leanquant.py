"""Reads LeanQuant's published checkpoints, which have a table per row, as sources.

For R rows, C columns and B bits, a weight is

    quant_grid     [R, 2^B]
    weight_codes   uint8 [R, C / 2], the even column in the high nibble, whatever B is
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lqexport.converters.checkpoints.layout import FLOATS, CheckpointLayout, Codes
from lqexport.errors import UserError
from lqexport.formats.moves import TableGrid


class LeanQuant(CheckpointLayout):
    """LeanQuant's layout. Tables are read as float16, to which LeanQuant's own loader rounds them by default."""

    container = "LeanQuant folder"
    mark = "quant_grid"
    parts = ("quant_grid", "weight_codes")

    def quantization_name(self, module: str) -> str:
        return f"leanquant:{(self.matrix(f'{module}.quant_grid')[1] - 1).bit_length()}"

    def shape(self, module: str) -> tuple[int, int]:
        rows, pairs = self.matrix(f"{module}.weight_codes")
        return rows, 2 * pairs

    def _table(self, module: str) -> NDArray[np.float32]:
        name = f"{module}.quant_grid"
        shape = (self.shape(module)[0], self.matrix(name)[1])
        table = self.checked_tensor(name, shape, FLOATS).half().float().numpy()
        if not np.isfinite(table).all():
            raise UserError(f"{name} holds numbers that are infinite or too large for float16.")
        return table

    def grid(self, module: str) -> TableGrid:
        return TableGrid(np.sort(self._table(module), axis=1), self.shape(module)[1])

    def codes(self, module: str) -> Codes:
        name, (rows, columns), table = f"{module}.weight_codes", self.shape(module), self._table(module)
        pairs = self.checked_tensor(name, (rows, columns // 2), (torch.uint8,)).numpy()
        stored = np.stack([pairs >> 4, pairs & 15], axis=2).reshape(rows, columns)
        if stored.max() >= table.shape[1]:
            raise UserError(f"{name} holds the code {stored.max()}, and a table {table.shape[1]} values.")
        ranks = np.argsort(np.argsort(table, axis=1), axis=1).astype(np.uint8)  # `grid` has the tables sorted
        return np.take_along_axis(ranks, stored, axis=1)
