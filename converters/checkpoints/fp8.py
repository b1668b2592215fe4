"""Reads FP8 checkpoints as sources, and NVIDIA ModelOpt's of FP8 and NVFP4.

    weight   float8_e4m3fn [R, C]
    scale    the factor by which the weights are multiplied: one for the matrix, [R] or [R, 1] for each row, or
             [ceil(R / r), ceil(C / c)] for each block of r rows and c columns (`weight_block_size` of config.json); the
             last blocks may be smaller. It is called weight_scale_inv (DeepSeek V3, Qwen3, Ministral 3), weight_scale
             (fbgemm, ModelOpt, AutoFP8) or scale (DeepSeek V4)

MXFP4 of DeepSeek V4's experts, beside FP8:

    weight   int8 [R, C / 2], two numbers in a byte (see `fp4.py`)
    scale    float8_e8m0fnu [R, C / 32]

NVFP4 of ModelOpt:

    weight           uint8 [R, C / 2], two numbers in a byte (see `fp4.py`)
    weight_scale     float8_e4m3fn [R, C / 16]
    weight_scale_2   float32, by which the products of numbers and scales are multiplied

Scales of activations are ignored.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lqexport.converters.checkpoints.fp4 import e2m1_codes, e2m1_grid, powers
from lqexport.converters.checkpoints.layout import FLOATS, CheckpointLayout, Codes
from lqexport.errors import UserError
from lqexport.formats.moves import FloatGrid

BLOCK = [128, 128]
"""Rows and columns of a block where config.json does not give them."""
SCALES = (*FLOATS, torch.float8_e8m0fnu)
SCALE_NAMES = ("weight_scale_inv", "weight_scale", "scale")
PACKED = (torch.uint8, torch.int8)
"""The dtypes of bytes that hold two numbers."""


class Fp8(CheckpointLayout):
    """FP8 weights, also beside MXFP4. No grid holds FP8, so such weights are solved again."""

    container = "FP8 folder"
    parts: tuple[str, ...] = ("weight", *SCALE_NAMES, "activation_scale", "input_scale", "input_scale_ub")
    fp4_name = "mxfp4:g32"

    def check(self) -> None:
        block = self.quantization.get("weight_block_size", BLOCK)
        if block is not None and not (
            isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
        ):
            raise UserError(f"This FP8 checkpoint has blocks of the size {block}; two numbers are read.")
        self._block = block or BLOCK

    def is_packed(self, module: str) -> bool:
        return f"{module}.weight" in self.names and self._scale_name(module) in self.names

    def _scale_name(self, module: str) -> str:
        names = [f"{module}.{name}" for name in SCALE_NAMES]
        return next((name for name in names if name in self.names), names[0])

    def _is_fp4(self, module: str) -> bool:
        """Returns whether two numbers share a byte. Each row has scales of its own then, one for 32 columns."""
        rows, stored = self.matrix(f"{module}.weight")
        is_of_v4 = self._scale_name(module) == f"{module}.scale"
        return is_of_v4 and rows > 1 and self._scale_shape(module) == (rows, stored // 16)

    def _fp4_grid(self, module: str) -> FloatGrid:
        """Returns the grid of packed numbers."""
        name, (rows, columns) = f"{module}.scale", self.shape(module)
        exponents = self.checked_tensor(name, (rows, columns // 32), (torch.float8_e8m0fnu, torch.uint8))
        return e2m1_grid(name, powers(name, exponents.view(torch.uint8).numpy()), columns)

    def quantization_name(self, module: str) -> str:
        if self._is_fp4(module):
            return self.fp4_name
        shape = self._scale_shape(module)
        if len(shape) == 2 and shape[1] > 0 and not self._is_by_row(module):
            return f"fp8:{self._block[0]}x{self._block[1]}"
        return "fp8:row" if self._is_by_row(module) else "fp8:matrix"

    def shape(self, module: str) -> tuple[int, int]:
        rows, columns = self.matrix(f"{module}.weight")
        return (rows, 2 * columns) if self._is_fp4(module) else (rows, columns)

    def grid(self, module: str) -> FloatGrid | None:
        return self._fp4_grid(module) if self._is_fp4(module) else None

    def codes(self, module: str) -> Codes:
        rows, columns = self.shape(module)
        packed = self.checked_tensor(f"{module}.weight", (rows, columns // 2), PACKED)
        return e2m1_codes(packed.view(torch.uint8).numpy())

    def _scale_shape(self, module: str) -> tuple[int, ...]:
        return self.stored.stored_shape(self._scale_name(module))

    def _is_by_row(self, module: str) -> bool:
        rows, shape = self.shape(module)[0], self._scale_shape(module)
        return rows > 1 and shape in ((rows,), (rows, 1))

    def read(self, module: str) -> NDArray[np.float32]:
        if (grid := self.grid(module)) is not None:
            return grid.values(self.codes(module))
        weight = self.checked_tensor(f"{module}.weight", self.shape(module), (torch.float8_e4m3fn,)).float()
        return (weight * self._scale(module)).numpy()

    def _scale(self, module: str) -> Tensor:
        """Returns the scales in a shape that multiplies the weights, float32."""
        name, shape, (rows, columns) = self._scale_name(module), self._scale_shape(module), self.shape(module)
        if shape in ((), (1,)) or self._is_by_row(module):
            scale = self.checked_tensor(name, shape, SCALES).float()
            return scale.reshape(-1, 1)
        high, wide = self._block
        blocks = self.checked_tensor(name, (-(-rows // high), -(-columns // wide)), SCALES).float()
        return blocks.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]


class ModelOpt(Fp8):
    """NVIDIA ModelOpt: NVFP4 or FP8, also one beside the other."""

    container = "ModelOpt folder"
    parts = (*Fp8.parts, "weight_scale_2")
    fp4_name = "nvfp4:g16"

    def check(self) -> None:
        super().check()
        algorithm = str(self.quantization.get("quant_algo"))
        if algorithm not in ("NVFP4", "FP8", "MIXED_PRECISION"):
            raise UserError(f"This ModelOpt checkpoint is quantized by {algorithm}; NVFP4 and FP8 are read.")

    def _is_fp4(self, module: str) -> bool:
        return f"{module}.weight_scale_2" in self.names

    def _fp4_grid(self, module: str) -> FloatGrid:
        name, of_all, (rows, columns) = f"{module}.weight_scale", f"{module}.weight_scale_2", self.shape(module)
        scale = self.checked_tensor(name, (rows, columns // 16), (torch.float8_e4m3fn,)).float()
        shape = self.stored.stored_shape(of_all)
        whole = self.checked_tensor(of_all, shape if shape == (1,) else (), FLOATS).float()
        return e2m1_grid(name, scale.numpy(), columns, float(whole))
