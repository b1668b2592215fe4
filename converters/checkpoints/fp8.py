"""FP8 checkpoints as sources, as DeepSeek V3 and Qwen3's FP8 models are published.

weight             float8_e4m3fn [R, C]
weight_scale_inv   float [ceil(R / r), ceil(C / c)]: what the weights of a block of r rows and c columns are
                   multiplied by (`weight_block_size` of config.json); the last blocks may be smaller
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lqexport.converters.checkpoints.layout import FLOATS, CheckpointLayout
from lqexport.errors import UserError

BLOCK = [128, 128]
"""Where config.json names no size."""


class Fp8(CheckpointLayout):
    """Floating-point numbers of 8 bits with a scale for each block. No grid holds them, so they are solved again."""

    container = "FP8 folder"
    mark = "weight_scale_inv"
    parts = ("weight", "weight_scale_inv", "activation_scale", "input_scale")

    def check(self) -> None:
        block = self.quantization.get("weight_block_size") or BLOCK
        if not isinstance(block, list) or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
            raise UserError(f"This FP8 checkpoint has blocks of the size {block}; two numbers are read.")
        self._block = block

    def kind(self, module: str) -> str:
        return f"fp8:{self._block[0]}x{self._block[1]}"

    def shape(self, module: str) -> tuple[int, int]:
        return self.matrix(f"{module}.weight")

    def grid(self, module: str) -> None:
        return None

    def read(self, module: str) -> NDArray[np.float32]:
        rows, columns = shape = self.shape(module)
        high, wide = self._block
        blocks = -(-rows // high), -(-columns // wide)
        scale = self.part(f"{module}.weight_scale_inv", blocks, FLOATS).float()
        weight = self.part(f"{module}.weight", shape, (torch.float8_e4m3fn,)).float()
        by_weight = scale.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
        return (weight * by_weight).numpy()
