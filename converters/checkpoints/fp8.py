"""Reads FP8 checkpoints as sources: the form in which DeepSeek V3 and Qwen3's FP8 models are published.

weight             float8_e4m3fn [R, C]
weight_scale_inv   float [ceil(R / r), ceil(C / c)]: the factor by which the weights of a block are multiplied. A block
                   has r rows and c columns (`weight_block_size` of config.json); the last ones may be smaller.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lqexport.converters.checkpoints.layout import FLOATS, CheckpointLayout
from lqexport.errors import UserError

BLOCK = [128, 128]
"""Rows and columns of a block where config.json does not give them."""


class Fp8(CheckpointLayout):
    """FP8 weights with a scale for each block. No grid holds such weights, so they are solved again."""

    container = "FP8 folder"
    mark = "weight_scale_inv"
    parts = ("weight", "weight_scale_inv", "activation_scale", "input_scale")

    def check(self) -> None:
        block = self.quantization.get("weight_block_size") or BLOCK
        if not isinstance(block, list) or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
            raise UserError(f"This FP8 checkpoint has blocks of the size {block}; two numbers are read.")
        self._block = block

    def quantization_name(self, module: str) -> str:
        return f"fp8:{self._block[0]}x{self._block[1]}"

    def shape(self, module: str) -> tuple[int, int]:
        return self.matrix(f"{module}.weight")

    def grid(self, module: str) -> None:
        return None

    def read(self, module: str) -> NDArray[np.float32]:
        rows, columns = shape = self.shape(module)
        block_rows, block_columns = self._block
        blocks = -(-rows // block_rows), -(-columns // block_columns)
        scale = self.checked_tensor(f"{module}.weight_scale_inv", blocks, FLOATS).float()
        weight = self.checked_tensor(f"{module}.weight", shape, (torch.float8_e4m3fn,)).float()
        by_weight = scale.repeat_interleave(block_rows, 0)[:rows].repeat_interleave(block_columns, 1)[:, :columns]
        return (weight * by_weight).numpy()
