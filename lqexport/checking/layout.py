"""Checks where tensors lie in a file: llama.cpp wants them aligned, in the order of the header and without gaps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lqexport.checking.opened import OpenFile
from lqexport.checking.problems import Problem, error, warning
from lqexport.converters.gguf.header import TensorData


def check_layout(file: OpenFile) -> Iterator[Problem]:
    """Yields the problems of each file's layout. `read_header` has found truncated files and overlaps before."""
    alignment = file.metadata.get("general.alignment", 32)
    if alignment & (alignment - 1):
        yield error("structure", f"The alignment is {alignment}, which is not a power of two.")
        return
    by_file: dict[Path, dict[str, TensorData]] = {path: {} for path in file.paths}
    for name, tensor in file.tensors.items():
        by_file[tensor.path][name] = tensor
    for path, tensors in by_file.items():
        yield from _of_one_file(path, tensors, alignment)


def _of_one_file(path: Path, tensors: dict[str, TensorData], alignment: int) -> Iterator[Problem]:
    if not tensors:
        yield error("structure", f"{path.name} has no tensors.")
        return
    expected = next(iter(tensors.values())).data_begin
    for name, tensor in tensors.items():
        if tensor.begin != expected:
            wrong = "is not aligned" if tensor.begin % alignment else "is not where the one before it ends"
            yield error("structure", f"{path.name}: the tensor {name} {wrong} (byte {tensor.begin}, not {expected}).")
            return
        expected = _padded(tensor.begin + tensor.nbytes, alignment)
    if (size := path.stat().st_size) > expected:
        yield warning("structure", f"{path.name} has {size - expected} bytes after its last tensor.")


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
