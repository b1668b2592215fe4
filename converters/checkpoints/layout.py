"""The base class of the layouts in which other tools store a quantized weight: several tensors, a grid and codes.

Each layout has a subclass that knows the tensors of a weight; `detect.py` chooses the subclass. What a checkpoint says
is never trusted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lqexport.errors import UserError
from lqexport.formats.moves import AffineGrid, FloatGrid, TableGrid
from lqexport.formats.native import unpack_bits

Codes = NDArray[np.uint8]
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class StoredByName(Protocol):
    """A checkpoint's tensors, by their names in its files. Both methods raise UserError if there is no such tensor."""

    def stored_shape(self, name: str) -> tuple[int, ...]: ...

    def stored_tensor(self, name: str) -> Tensor: ...


class CheckpointLayout:
    """The way in which a tool stores the weight of a quantized module X: as several tensors X.part.

    container   name of such a folder, for listings
    mark        the part that every quantized module has, and no other module, unless `is_packed` says otherwise
    parts       all parts that a quantized module can have
    gridless    why no codec has the values of a module whose `grid` is None, for messages

    Methods that read raise UserError if a tensor is missing, damaged, or of another shape or dtype.
    """

    container: str
    mark: str
    parts: tuple[str, ...]
    gridless = "its codes are floating-point numbers"

    def __init__(self, stored: StoredByName, names: Iterable[str], quantization: dict[str, Any]) -> None:
        self.stored, self.names, self.quantization = stored, set(names), quantization
        self.check()

    def check(self) -> None:
        """Raises UserError if config.json names a variant of the layout that is not read."""

    def tensor_of(self, name: str) -> str:
        """Returns the name of the model's tensor that a stored tensor is, or is a part of."""
        module, _, part = name.rpartition(".")
        return f"{module}.weight" if part in self.parts and self.is_packed(module) else name

    def is_packed(self, module: str) -> bool:
        """Returns whether a module's weight is stored in parts."""
        return f"{module}.{self.mark}" in self.names

    def parts_of(self, module: str) -> list[str]:
        """Returns the names of the stored tensors that make up a module's weight."""
        return [name for part in self.parts if (name := f"{module}.{part}") in self.names]

    def quantization_name(self, module: str) -> str:
        """Returns method, bits and group size of a module for listings, such as `gptq:4-g128-sym`."""
        raise NotImplementedError

    def shape(self, module: str) -> tuple[int, int]:
        """Returns the rows (outputs) and columns (inputs) of a module's weight."""
        raise NotImplementedError

    def grid(self, module: str) -> AffineGrid | FloatGrid | TableGrid | None:
        """Returns the values that a module's weights may take; None if no codec has such values."""
        raise NotImplementedError

    def codes(self, module: str) -> Codes:
        """Returns the codes of a module's weights on its grid, uint8 [R, C]."""
        raise NotImplementedError

    def read(self, module: str) -> NDArray[np.float32]:
        """Returns a module's decoded weight, float32 [R, C]."""
        grid = self.grid(module)
        assert grid is not None  # a layout with other weights has its own `read`
        return grid.values(self.codes(module))

    def checked_tensor(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Tensor:
        """Returns a stored tensor. Raises UserError unless it has this shape and one of the dtypes."""
        tensor = self.stored.stored_tensor(name)
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            raise UserError(
                f"{name} should be {dtypes[0]} {list(shape)}, not {tensor.dtype} {list(tensor.shape)}: the "
                "checkpoint is damaged, or its layout is not the one that its config.json names."
            )
        return tensor

    def words(self, name: str, shape: tuple[int, ...]) -> NDArray[np.int32]:
        """Returns a stored tensor of int32. Raises UserError if it has another shape or dtype."""
        return self.checked_tensor(name, shape, (torch.int32,)).numpy()

    def matrix(self, name: str) -> tuple[int, int]:
        """Returns the shape of a stored tensor. Raises UserError unless it has two dimensions."""
        shape = self.stored.stored_shape(name)
        if len(shape) != 2 or 0 in shape:
            raise UserError(f"{name} should have two dimensions, but its shape is {list(shape)}.")
        return shape[0], shape[1]

    def bits(self, name: str, words: int, integers: int) -> int:
        """Returns the bits per integer, if a line of tensor `name` has `integers` integers in `words` int32 words.

        Raises UserError if the integers do not fill the words, or do not have 1 to 8 bits.
        """
        bits, rest = divmod(32 * words, integers)
        if rest or not 1 <= bits <= 8:
            raise UserError(f"{name} does not hold lines of {integers} integers of 1 to 8 bits without a gap.")
        return bits

    def group_of(self, name: str, columns: int, groups: int) -> NDArray[np.int64]:
        """Returns the group of each column, int64 [C].

        It is read from the stored tensor `name`; without such a tensor, groups are runs of consecutive columns. Raises
        UserError if a group has no scale, or if groups of one size do not fill the columns.
        """
        if name in self.names:
            group_of = self.words(name, (columns,)).astype(np.int64)
            if group_of.min() < 0 or group_of.max() >= groups:
                raise UserError(f"{name} names a group that is not among the {groups} that have a scale.")
            return group_of
        if columns % groups:
            raise UserError(f"{groups} groups do not divide the {columns} columns that {name} would be of.")
        return np.arange(columns) // (columns // groups)


def streams(words: NDArray[np.int32], bits: int, count: int) -> Codes:
    """Returns integers uint8 [lines, count] from words [lines, n], where each line is one bit stream."""
    return unpack_bits(np.ascontiguousarray(words).view(np.uint8), bits, count)


def size_name(columns: int, groups: int) -> str:
    """Returns the group size as it stands in names of codecs: `g128`, or `row` for one group per row."""
    return f"g{columns // groups}" if groups > 1 else "row"
