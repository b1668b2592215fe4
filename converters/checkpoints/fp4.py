"""Floating-point numbers of 4 bits (E2M1) as checkpoints pack them, and OpenAI's checkpoints of gpt-oss (MXFP4).

A byte holds two numbers, that of the even column in its low nibble. A nibble has a sign bit above three bits, which
stand for 0, 1/2, 1, 3/2, 2, 3, 4, 6. Each group of columns of a row has a scale:

    MXFP4   a byte e for 32 columns: 2^(e - 127)
    NVFP4   a float8 for 16 columns, and a float32 for the matrix, by which the product of the others is multiplied
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lqexport.converters.checkpoints.layout import CheckpointLayout, Codes
from lqexport.errors import UserError
from lqexport.formats.gguf import E2M1, e2m1_ranks
from lqexport.formats.moves import FloatGrid

LARGEST = 252
"""The largest byte e with which 6 * 2^(e - 127) is finite in float32."""


def e2m1_codes(packed: NDArray[np.uint8]) -> Codes:
    """Returns the ranks among `E2M1` of packed numbers, uint8 [R, C], from bytes uint8 [R, C / 2]."""
    return e2m1_ranks(np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1))


def e2m1_grid(name: str, scale: NDArray[np.float32], columns: int, whole: float = 1.0) -> FloatGrid:
    """Returns the grid of a matrix of packed numbers with scales float32 [R, G], by which they are multiplied.

    name    the stored scales, for the message
    whole   a float32 by which the product is multiplied

    Raises UserError unless groups of one size fill the columns.
    """
    groups = scale.shape[1] if scale.ndim == 2 else 0
    if not groups or columns % groups:
        raise UserError(f"{name}, {list(scale.shape)}, does not fit a matrix of {columns} columns.")
    halves = scale / np.float32(2)  # E2M1 has twice the numbers
    return FloatGrid(E2M1, halves, np.arange(columns) // (columns // groups), whole)


def powers(name: str, exponents: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Returns the scales 2^(e - 127), float32, of bytes e. Raises UserError if weights could be infinite."""
    if exponents.size and exponents.max() > LARGEST:
        raise UserError(f"{name} holds the exponent {exponents.max()}, with which weights are infinite.")
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)


class Mxfp4(CheckpointLayout):
    """gpt-oss as OpenAI publishes it: `weight_blocks` uint8 [R, C / 32, 16] and `weight_scales` uint8 [R, C / 32].

    These names stand for the rows of one linear in the stored tensors of all experts (`openai.py` of the families).
    """

    container = "MXFP4 folder"
    mark = "weight_blocks"
    parts = ("weight_blocks", "weight_scales")

    def quantization_name(self, module: str) -> str:
        return "mxfp4:g32"

    def shape(self, module: str) -> tuple[int, int]:
        shape = self.stored.stored_shape(f"{module}.weight_blocks")
        if len(shape) != 3 or 0 in shape or shape[2] != 16:
            raise UserError(f"{module}.weight_blocks should be rows of blocks of 16 bytes, but is {list(shape)}.")
        return shape[0], 32 * shape[1]

    def _bytes(self, name: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        return self.checked_tensor(name, shape, (torch.uint8,)).numpy()

    def grid(self, module: str) -> FloatGrid:
        rows, columns = self.shape(module)
        name = f"{module}.weight_scales"
        return e2m1_grid(name, powers(name, self._bytes(name, (rows, columns // 32))), columns)

    def codes(self, module: str) -> Codes:
        rows, columns = self.shape(module)
        return e2m1_codes(self._bytes(f"{module}.weight_blocks", (rows, columns // 32, 16)).reshape(rows, -1))
