"""Compares the shapes of a file's tensors with its metadata."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import isnan, nan

from lqexport.checking.block_sizes import BlockSizes, block_sizes
from lqexport.checking.opened import OpenFile
from lqexport.checking.problems import Problem, error, warning
from lqexport.checking.shape_table import shape_table
from lqexport.errors import listed

OF_BLOCK = re.compile(r"^blk\.(\d{1,6})\.")
Shape = tuple[float, ...]
"""A shape, rows first; NaN stands for any number."""


def check_shapes(file: OpenFile) -> Iterator[Problem]:
    """Yields the tensors whose shape is not the one that the metadata gives, by `shape_table`.

    In an architecture of which we have no entry, another shape is a warning.
    """
    expected = _Expected(file)
    wrong = [
        f"{name} is {list(tensor.shape)}, not {_shown(shapes[0])}"
        for name, tensor in file.tensors.items()
        if (shapes := expected.shapes(name)) and not any(_is_like(tensor.shape, shape) for shape in shapes)
    ]
    if wrong:
        sentence = f"{len(wrong)} tensors have another shape than the metadata says: {listed(wrong, 3)}."
        yield error("shapes", sentence, unless_loaded=True) if file.entries else warning("shapes", sentence)


class _Expected:
    """The shapes that the tensors of a file may have by its metadata."""

    def __init__(self, file: OpenFile) -> None:
        self._file, self._table, self._sizes = file, shape_table(file), dict[int, BlockSizes]()

    def shapes(self, name: str) -> list[Shape]:
        """Returns the shapes that a tensor may have; [] where the table does not have it."""
        match = OF_BLOCK.match(name)
        block, within = (int(match[1]), name[match.end() :]) if match else (0, name)
        module, _, end = within.rpartition(".")
        if end not in ("weight", "bias") or module not in self._table:
            return []
        if block not in self._sizes:
            self._sizes[block] = block_sizes(self._file, block) | {"one": 1, "any": nan}
        shapes = [tuple(self._sizes[block][size] for size in sizes) for sizes in self._table[module]]
        return [shape[:-1] or shape for shape in shapes] if end == "bias" else shapes


def _is_like(shape: tuple[int, ...], expected: Shape) -> bool:
    """Returns whether a tensor has a shape; leading ones do not count."""
    axes = max(len(shape), len(expected))
    pairs = zip((1,) * (axes - len(shape)) + shape, (1,) * (axes - len(expected)) + expected, strict=True)
    return all(isnan(wanted) or size == wanted for size, wanted in pairs)


def _shown(shape: Shape) -> str:
    return "[" + ", ".join("?" if isnan(size) else f"{size:g}" for size in shape) + "]"
