"""Reads bitsandbytes checkpoints as sources: NF4 and FP4 in blocks, and INT8 by rows.

4 bits, for R rows, C columns and blocks of B weights, which run on from row to row:

    weight               uint8 [R * C / 2, 1]: two codes in a byte, the first in its high nibble
    weight.quant_map     float32 [16], the value of each code
    weight.absmax        float32 [R * C / B], by which a block's values are multiplied, or uint8 codes of them
    weight.quant_state.bitsandbytes__nf4 (or fp4)   JSON as bytes: shape, blocksize, and of nested scales
                         nested_blocksize and nested_offset
    weight.nested_quant_map, weight.nested_absmax   where absmax are codes: a block's factor is
                         nested_quant_map[code] * nested_absmax[block of codes] + nested_offset

8 bits:

    weight               int8 [R, C]
    SCB                  float32 [R], the largest magnitude of a row, which 127 stands for

The layout is that of `QuantState.as_dict` and `Linear8bitLt` in bitsandbytes.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lqexport.converters.checkpoints.layout import CheckpointLayout, Codes
from lqexport.errors import UserError, well_formed
from lqexport.formats.moves import AffineGrid

STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
FOUR_BITS = ("weight", "weight.absmax", "weight.quant_map", *NESTED, *STATES)
EIGHT_BITS = ("weight", "SCB", "weight_format")


class BitsAndBytes(CheckpointLayout):
    """bitsandbytes: tables of 16 values with a scale for each block, or integers with a scale for each row."""

    container = "bitsandbytes folder"
    parts = tuple(dict.fromkeys((*FOUR_BITS, *EIGHT_BITS)))

    def tensor_of(self, name: str) -> str:
        for part in self.parts:
            module = name.removesuffix(f".{part}")
            if module != name and self.is_packed(module):
                return f"{module}.weight"
        return name

    def is_packed(self, module: str) -> bool:
        return f"{module}.SCB" in self.names or self._state_name(module) is not None

    def _state_name(self, module: str) -> str | None:
        return next((name for state in STATES if (name := f"{module}.{state}") in self.names), None)

    def _state(self, module: str) -> dict[str, Any]:
        name = str(self._state_name(module))
        content = self.checked_tensor(name, self.stored.stored_shape(name), (torch.uint8,)).numpy().tobytes()
        with well_formed(name):
            state: dict[str, Any] = json.loads(content)
            rows, columns = state["shape"]
            numbers = (rows, columns, state["blocksize"], state.get("nested_blocksize", 1))
            if not all(isinstance(number, int) and number > 0 for number in numbers):
                raise ValueError("a size is no positive number")
        return state

    def quantization_name(self, module: str) -> str:
        name = self._state_name(module)
        return f"bitsandbytes:{name[-3:]}-{self._state(module)['blocksize']}" if name else "bitsandbytes:8-row"

    def shape(self, module: str) -> tuple[int, int]:
        if self._state_name(module) is None:
            return self.matrix(f"{module}.weight")
        rows, columns = self._state(module)["shape"]
        return rows, columns

    def grid(self, module: str) -> AffineGrid | None:
        if self._state_name(module):
            return None
        rows, columns = self.shape(module)
        step = self._floats(f"{module}.SCB", rows) / np.float32(127)
        return AffineGrid(8, step[:, None], np.full((rows, 1), 128, np.int16), np.zeros(columns, np.int64))

    def codes(self, module: str) -> Codes:
        stored = self.checked_tensor(f"{module}.weight", self.shape(module), (torch.int8,)).numpy()
        return stored.view(np.uint8) ^ np.uint8(128)  # flipping the sign bit adds 128

    def read(self, module: str) -> NDArray[np.float32]:
        if self._state_name(module) is None:
            return super().read(module)
        state = self._state(module)
        rows, columns = state["shape"]
        count, size = rows * columns, state["blocksize"]
        packed = self._bytes(f"{module}.weight", -(-count // 2))
        codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:count]
        factors = self._factors(module, -(-count // size), state)
        values = self._floats(f"{module}.weight.quant_map", 16)[codes] * np.repeat(factors, size)[:count]
        return values.reshape(rows, columns)

    def _factors(self, module: str, blocks: int, state: dict[str, Any]) -> NDArray[np.float32]:
        """Returns the factor of each block, float32 [blocks]."""
        if f"{module}.{NESTED[0]}" not in self.names:
            return self._floats(f"{module}.weight.absmax", blocks)
        codes, size = self._bytes(f"{module}.weight.absmax", blocks), state.get("nested_blocksize", 1)
        table = self._floats(f"{module}.weight.nested_quant_map", 256)
        outer = self._floats(f"{module}.weight.nested_absmax", -(-blocks // size))
        with well_formed(self._state_name(module)):
            return table[codes] * np.repeat(outer, size)[:blocks] + np.float32(state["nested_offset"])

    def _bytes(self, name: str, count: int) -> NDArray[np.uint8]:
        return self._vector(name, count, torch.uint8)

    def _floats(self, name: str, count: int) -> NDArray[np.float32]:
        return self._vector(name, count, torch.float32)

    def _vector(self, name: str, count: int, dtype: torch.dtype) -> NDArray[Any]:
        """Returns a stored tensor as a vector. Raises UserError unless it has this many numbers, of this dtype."""
        shape = self.stored.stored_shape(name)
        if int(np.prod(shape)) != count:
            raise UserError(f"{name} should hold {count} numbers, but its shape is {list(shape)}.")
        return self.checked_tensor(name, shape, (dtype,)).numpy().reshape(-1)
