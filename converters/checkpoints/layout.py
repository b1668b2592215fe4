"""A matrix of a checkpoint that another tool has quantized: several stored tensors, a grid and codes. Trusts nothing in
it. What a matrix is made of, each layout's own class says; `checkpoints.py` tells them apart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lqexport.errors import UserError
from lqexport.formats.moves import AffineGrid, TableGrid
from lqexport.formats.native import unpack_bits

Codes = NDArray[np.uint8]
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class StoredByName(Protocol):
    """A checkpoint's tensors by the names that its files give them. Both raise UserError where there is none."""

    def stored_shape(self, name: str) -> tuple[int, ...]: ...

    def stored_tensor(self, name: str) -> Tensor: ...


class CheckpointLayout:
    """How a tool stores the weight of a module X that it has quantized: as several tensors X.part.

    container   what to call such a folder
    mark        the part that every such module has, and no other
    parts       all of them

    Methods that read raise UserError where a tensor is missing, damaged or of another shape or dtype.
    """

    container: str
    mark: str
    parts: tuple[str, ...]

    def __init__(self, stored: StoredByName, names: Iterable[str], quantization: dict[str, Any]) -> None:
        self.stored, self.names, self.quantization = stored, set(names), quantization
        self.check()

    def check(self) -> None:
        """Raises UserError where the quantization is of a kind that is not read."""

    def tensor_of(self, name: str) -> str:
        """The model's tensor that a stored one is, or is a part of."""
        module, _, part = name.rpartition(".")
        return f"{module}.weight" if part in self.parts and self.is_packed(module) else name

    def is_packed(self, module: str) -> bool:
        """Whether a module's weight is stored in parts."""
        return f"{module}.{self.mark}" in self.names

    def parts_of(self, module: str) -> list[str]:
        """The stored tensors that its weight is made of."""
        return [name for part in self.parts if (name := f"{module}.{part}") in self.names]

    def kind(self, module: str) -> str:
        """For a listing: method, bits and group, such as `gptq:4-g128-sym`."""
        raise NotImplementedError

    def shape(self, module: str) -> tuple[int, int]:
        """Rows (outputs) and columns (inputs) of the weight."""
        raise NotImplementedError

    def grid(self, module: str) -> AffineGrid | TableGrid | None:
        """The values that the weights may take; None where they are neither integers nor codes of a table."""
        raise NotImplementedError

    def codes(self, module: str) -> Codes:
        """Codes of the weights on that grid, uint8 [R, C]."""
        raise NotImplementedError

    def read(self, module: str) -> NDArray[np.float32]:
        """The weight, float32 [R, C]."""
        grid = self.grid(module)
        assert grid is not None  # a layout that has others reads them itself
        return grid.values(self.codes(module))

    def part(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Tensor:
        """A stored tensor, which must be of that shape and one of the dtypes."""
        tensor = self.stored.stored_tensor(name)
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            raise UserError(
                f"{name} should be {dtypes[0]} {list(shape)}, not {tensor.dtype} {list(tensor.shape)}: the "
                "checkpoint is damaged, or its layout is not the one that its config.json names."
            )
        return tensor

    def words(self, name: str, shape: tuple[int, ...]) -> NDArray[np.int32]:
        """A stored tensor of int32."""
        return self.part(name, shape, (torch.int32,)).numpy()

    def matrix(self, name: str) -> tuple[int, int]:
        """The shape of a stored tensor, which must have two dimensions."""
        shape = self.stored.stored_shape(name)
        if len(shape) != 2 or 0 in shape:
            raise UserError(f"{name} should have two dimensions, but its shape is {list(shape)}.")
        return shape[0], shape[1]

    def bits(self, name: str, words: int, integers: int) -> int:
        """The bits of each of `integers` that fill `words` of int32 in the stored tensor `name`."""
        bits, rest = divmod(32 * words, integers)
        if rest or not 1 <= bits <= 8:
            raise UserError(f"{name} does not hold lines of {integers} integers of 1 to 8 bits without a gap.")
        return bits

    def group_of(self, name: str, columns: int, groups: int) -> NDArray[np.int64]:
        """The group of each column: as the stored tensor `name` says, or, where there is none, consecutive columns."""
        if name in self.names:
            found = self.words(name, (columns,)).astype(np.int64)
            if found.min() < 0 or found.max() >= groups:
                raise UserError(f"{name} names a group that is not among the {groups} that have a scale.")
            return found
        if columns % groups:
            raise UserError(f"{groups} groups do not divide the {columns} columns that {name} would be of.")
        return np.arange(columns) // (columns // groups)


def streams(words: NDArray[np.int32], bits: int, count: int) -> Codes:
    """Integers uint8 [lines, count] of lines of words, each one bit stream."""
    return unpack_bits(np.ascontiguousarray(words).view(np.uint8), bits, count)


def size_name(columns: int, groups: int) -> str:
    """Columns of a group, as codecs name them."""
    return f"g{columns // groups}" if groups > 1 else "row"
