"""Reads compressed-tensors checkpoints as sources.

For R rows, C columns, G groups and B bits, the formats are

    pack-quantized   weight_packed int32 [R, C * B / 32], each row one bit stream of little-endian words
                     weight_scale [R, G]
                     weight_shape, R and C
                     weight_zero_point int32 [R * B / 32, G], unless symmetric
    nvfp4- and mxfp4-pack-quantized
                     weight_packed uint8 [R, C / 2], two numbers of 4 bits in a byte (see `fp4.py`)
                     weight_scale float8 [R, C / 16], and weight_global_scale, by whose reciprocal in float32 the
                     products of numbers and scales are multiplied; of mxfp4 uint8 [R, C / 32]
    the others       weight int8 or float8 [R, C]
                     weight_scale, one for the whole matrix, or one for each row, group or block
                     weight_zero_point int8, of the same shape, unless symmetric
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lqexport.converters.checkpoints.fp4 import e2m1_codes, e2m1_grid, powers
from lqexport.converters.checkpoints.layout import FLOATS, CheckpointLayout, Codes, size_name, streams
from lqexport.errors import UserError
from lqexport.formats.moves import AffineGrid, FloatGrid

FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
)  # fmt: skip
MIXED = "mixed-precision"
"""The format of a checkpoint where each group of modules has a format of its own."""


class CompressedTensors(CheckpointLayout):
    """compressed-tensors: packed integers of 1 to 8 bits, or bytes."""

    container = "compressed-tensors folder"
    mark = "weight_scale"
    parts = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
             "weight_global_scale", "input_scale", "input_zero_point", "input_global_scale")  # fmt: skip

    def check(self) -> None:
        groups = (self.quantization.get("config_groups") or {}).values()
        formats = {str(form) for group in groups if (form := (group or {}).get("format"))}
        if (whole := str(self.quantization.get("format"))) != MIXED or not formats:
            formats.add(whole)
        if unknown := formats - set(FORMATS):
            raise UserError(
                f"This compressed-tensors checkpoint is in the format {', '.join(sorted(unknown))}; "
                f"{', '.join(FORMATS)} are read."
            )

    def _has(self, name: str) -> bool:
        return name in self.names

    def _width(self, module: str) -> int:
        packed = f"{module}.weight_packed"
        return self.bits(packed, self.matrix(packed)[1], self.shape(module)[1]) if self._has(packed) else 8

    def _is_fp4(self, module: str) -> bool:
        return self._has(f"{module}.weight_packed") and not self._has(f"{module}.weight_shape")

    def quantization_name(self, module: str) -> str:
        scale = self.stored.stored_shape(f"{module}.weight_scale")
        size = size_name(self.shape(module)[1], scale[1] if len(scale) == 2 else 1)
        if self._is_fp4(module):
            return f"{'nvfp4' if self._has(f'{module}.weight_global_scale') else 'mxfp4'}:{size}"
        symmetric = "" if self._has(f"{module}.weight_zero_point") else "-sym"
        return f"{self._format(module)}:{self._width(module)}-{size}{symmetric}"

    def _format(self, module: str) -> str:
        """Returns the format of a module of integers or of float8."""
        if (whole := str(self.quantization["format"])) != MIXED:
            return whole
        if self._has(f"{module}.weight_packed"):
            return "pack-quantized"
        return "float-quantized" if self._is_float(module) else "int-quantized"

    def shape(self, module: str) -> tuple[int, int]:
        if not self._has(f"{module}.weight_packed"):
            return self.matrix(f"{module}.weight")
        lines, words = self.matrix(f"{module}.weight_packed")
        if self._is_fp4(module):
            return lines, 2 * words
        rows, columns = self.checked_tensor(f"{module}.weight_shape", (2,), (torch.int64, torch.int32)).tolist()
        if rows != lines or not 4 * words <= columns <= 32 * words:  # 1 to 8 bits each
            raise UserError(f"{module}.weight_shape is [{rows}, {columns}], which weight_packed does not hold.")
        return rows, columns

    def _scale(self, module: str) -> NDArray[np.float32]:
        """Returns the scales as float32 [R, G]; stored are one per matrix, row, group, or block of rows and columns."""
        name, (rows, _) = f"{module}.weight_scale", self.shape(module)
        scale = self.checked_tensor(name, self.stored.stored_shape(name), FLOATS).float()
        return _by_row(name, scale, rows).numpy()

    def _zero(self, module: str, groups: int) -> NDArray[np.int16]:
        """Returns the zero points as int16 [R, G], raised by the same number that makes signed codes unsigned."""
        name, bits, (rows, _) = f"{module}.weight_zero_point", self._width(module), self.shape(module)
        if not self._has(name):
            return np.full((rows, groups), 2 ** (bits - 1), np.int16)
        if self._has(f"{module}.weight_packed"):
            words = self.words(name, (-(-rows * bits // 32), groups))
            return streams(words.T, bits, rows).T.astype(np.int16)
        stored = self.checked_tensor(name, self.stored.stored_shape(f"{module}.weight_scale"), (torch.int8,))
        return _by_row(name, stored, rows).numpy() + np.int16(128)

    def _bytes(self, module: str) -> Tensor:
        return self.checked_tensor(f"{module}.weight", self.shape(module), (torch.int8, torch.float8_e4m3fn))

    def _is_float(self, module: str) -> bool:
        return not self._has(f"{module}.weight_packed") and self._bytes(module).dtype != torch.int8

    def grid(self, module: str) -> AffineGrid | FloatGrid | None:
        if self._is_fp4(module):
            return self._fp4(module)
        return None if self._is_float(module) else self._affine(module)

    def _fp4(self, module: str) -> FloatGrid:
        name, whole, (rows, columns) = f"{module}.weight_scale", f"{module}.weight_global_scale", self.shape(module)
        if self._has(f"{module}.weight_zero_point"):
            raise UserError(f"{module}.weight_zero_point is not read: numbers of 4 bits have a sign.")
        if not self._has(whole):
            exponents = self.checked_tensor(name, (rows, columns // 32), (torch.uint8,)).numpy()
            return e2m1_grid(name, powers(name, exponents), columns)
        scale = self.checked_tensor(name, (rows, columns // 16), (torch.float8_e4m3fn, *FLOATS)).float()
        divisor = self.checked_tensor(whole, self.stored.stored_shape(whole), FLOATS).float()
        if divisor.numel() != 1:
            raise UserError(f"{whole} should be one number, but its shape is {list(divisor.shape)}.")
        return e2m1_grid(name, scale.numpy(), columns, float(1 / divisor))

    def _affine(self, module: str) -> AffineGrid:
        """Returns the grid; for floating-point codes, only its scales and groups mean something."""
        scale, (_, columns) = self._scale(module), self.shape(module)
        groups = scale.shape[1]
        group_of = self.group_of(f"{module}.weight_g_idx", columns, groups)
        return AffineGrid(self._width(module), scale, self._zero(module, groups), group_of)

    def codes(self, module: str) -> Codes:
        packed, (rows, columns) = f"{module}.weight_packed", self.shape(module)
        if self._is_fp4(module):
            return e2m1_codes(self.checked_tensor(packed, (rows, columns // 2), (torch.uint8,)).numpy())
        if not self._has(packed):
            return self._bytes(module).numpy().view(np.uint8) ^ np.uint8(128)  # flipping the sign bit adds 128
        bits = self._width(module)
        return streams(self.words(packed, (rows, columns * bits // 32)), bits, columns)

    def read(self, module: str) -> NDArray[np.float32]:
        if not self._is_float(module):
            return super().read(module)
        scales = self._affine(module)
        return self._bytes(module).float().numpy() * scales.scale[:, scales.group_of]


def _by_row(name: str, stored: Tensor, rows: int) -> Tensor:
    """Returns as [R, G] what is stored once per matrix, per row, or per block of rows."""
    lines = stored.reshape(-1, 1) if stored.ndim < 2 else stored
    if lines.ndim != 2 or 0 in lines.shape or rows % len(lines):
        raise UserError(f"{name}, {list(stored.shape)}, does not fit a matrix of {rows} rows.")
    return lines.repeat_interleave(rows // len(lines), 0)
