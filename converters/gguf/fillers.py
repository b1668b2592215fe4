"""Tensors that llama.cpp wants in a file and never computes with: keys and values of blocks that use earlier ones.

Their values are zero.
"""

from __future__ import annotations

from collections.abc import Iterable

from lqexport.converters.gguf.file import GGUFEntry
from lqexport.converters.models.architecture import BORROWED, Architecture


def filler_shapes(architecture: Architecture, layers: int, entries: Iterable[GGUFEntry]) -> dict[str, tuple[int, ...]]:
    """Returns GGUF name -> shape of the tensors that `fills` of an entry is about; {} where there are none.

    layers    number of decoder blocks
    entries   the tensors of the file; those of the first block say what shapes there are
    """
    if not architecture.fills or architecture.first_borrower is None:
        return {}
    modules = [architecture.gguf_block[module] for module in BORROWED if module in architecture.gguf_block]
    names = {f"blk.0.{module}.weight": module for module in modules}
    shapes = {names[entry.gguf_name]: entry.gguf_shape for entry in entries if entry.gguf_name in names}
    return {
        f"blk.{block}.{module}.weight": shape
        for block in range(architecture.first_borrower, layers)
        for module, shape in shapes.items()
    }
