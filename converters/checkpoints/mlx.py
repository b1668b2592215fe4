"""Reads folders of mlx-lm as sources, whoever wrote them.

    X.weight   uint32 [R, C * B / 32], the codes of a row as a bit stream
    X.scales   [R, C / N] in the dtype of the model; bytes where the codes are floating-point numbers
    X.biases   as the scales, in mode affine

`quantization` of config.json has the group size N, the bits B and the mode, and by their names those of the modules
that differ. A weight of mode affine is `scale * code + bias`, with product and sum rounded to the dtype of the scales.
The other modes have floating-point numbers of 4 bits (`fp4.py`) with the scales of MXFP4 or NVFP4, and of 8 bits with
those of MXFP4.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lqexport.converters.checkpoints.fp4 import e2m1_codes, e2m1_grid, powers
from lqexport.converters.checkpoints.layout import FLOATS, CheckpointLayout, Codes, streams
from lqexport.errors import UserError
from lqexport.formats.moves import FloatGrid

MODES = {"affine": (2, 3, 4, 5, 6, 8), "mxfp4": (4,), "nvfp4": (4,), "mxfp8": (8,)}
"""Mode -> the bits that it has."""


class Mlx(CheckpointLayout):
    """A folder of mlx-lm. Numbers of 4 bits can move to other formats; all other weights are solved again."""

    container = "MLX folder"
    mark = "scales"
    parts = ("weight", "scales", "biases")
    gridless = "its values are rounded to 16 bits"

    def check(self) -> None:
        if stack := next((name for name in self.names if ".switch_mlp." in name), None):
            raise UserError(
                f"{stack} holds the experts of a block as mlx-lm stacks them, which is not read as a source: quantize "
                "the model that the folder was made of."
            )

    def quantization_name(self, module: str) -> str:
        mode, bits, group = self._settings(module)
        return f"mlx:{bits}-g{group}" if mode == "affine" else f"mlx:{mode}"

    def shape(self, module: str) -> tuple[int, int]:
        _, bits, group = self._settings(module)
        rows, words = self.matrix(f"{module}.weight")
        columns, rest = divmod(32 * words, bits)
        if rest or columns % group:
            raise UserError(f"{module}.weight does not hold rows of whole groups of {group} codes of {bits} bits.")
        return rows, columns

    def grid(self, module: str) -> FloatGrid | None:
        mode, _, _ = self._settings(module)
        columns, name = self.shape(module)[1], f"{module}.scales"
        if mode == "mxfp4":
            return e2m1_grid(name, powers(name, self._bytes(module)), columns)
        if mode == "nvfp4":
            scales = torch.from_numpy(self._bytes(module)).view(torch.float8_e4m3fn)
            return e2m1_grid(name, scales.float().numpy(), columns)
        return None

    def codes(self, module: str) -> Codes:
        mode, bits, _ = self._settings(module)
        rows, columns = self.shape(module)
        stored = self.checked_tensor(f"{module}.weight", (rows, columns * bits // 32), (torch.uint32,))
        words = stored.view(torch.int32).numpy()
        return e2m1_codes(words.view(np.uint8)) if mode.endswith("fp4") else streams(words, bits, columns)

    def read(self, module: str) -> NDArray[np.float32]:
        mode, _, group = self._settings(module)
        if mode.endswith("fp4"):
            return super().read(module)
        (rows, columns), codes = self.shape(module), torch.from_numpy(self.codes(module))
        grouped = codes.reshape(rows, columns // group, group)
        if mode == "mxfp8":
            scales = torch.from_numpy(powers(f"{module}.scales", self._bytes(module)))
            values = (grouped.view(torch.float8_e4m3fn).float() * scales[..., None]).bfloat16()
        else:
            scales, biases = self._numbers(module, "scales", FLOATS), self._numbers(module, "biases", FLOATS)
            values = grouped.to(scales.dtype) * scales[..., None] + biases[..., None]  # rounded twice
        return values.float().reshape(rows, columns).numpy()

    def _settings(self, module: str) -> tuple[str, int, int]:
        """Returns mode, bits and group size of a module."""
        apart = self.quantization.get(module)
        settings = apart if isinstance(apart, dict) else self.quantization
        mode, bits, group = (settings.get(key) for key in ("mode", "bits", "group_size"))
        mode = "affine" if mode is None else str(mode)
        if bits not in MODES.get(mode, ()) or not isinstance(group, int) or group < 1:
            raise UserError(f"MLX has no mode {mode} of {bits} bits in groups of {group}, as config.json has {module}.")
        return mode, bits, group

    def _numbers(self, module: str, part: str, dtypes: tuple[torch.dtype, ...]) -> Tensor:
        rows, columns = self.shape(module)
        return self.checked_tensor(f"{module}.{part}", (rows, columns // self._settings(module)[2]), dtypes)

    def _bytes(self, module: str) -> NDArray[np.uint8]:
        return self._numbers(module, "scales", (torch.uint8,)).numpy()
