"""Writes a folder of safetensors shards, tensor by tensor, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lqexport.errors import UserError
from lqexport.storage.files import cannot_write, check_space, claimed, write_json, written_whole

SHARD_BYTES = 5 * 10**9
"""The most bytes of tensors in one shard; transformers has the same limit."""
DTYPES = {"uint8": "U8", "int16": "I16", "int32": "I32", "uint32": "U32", "int64": "I64", "float16": "F16"}
DTYPES |= {"float32": "F32", "uint16": "BF16"}
"""NumPy's name of a dtype -> the name that safetensors has for it. uint16 has the bits of bfloat16 here."""


@dataclass(frozen=True)
class FolderTensor:
    """One tensor of the model and the tensors that the folder stores for it.

    stored   name in the file -> dtype and shape
    """

    name: str
    stored: dict[str, tuple[np.dtype, tuple[int, ...]]]

    @property
    def nbytes(self) -> int:
        return sum(_size(*form) for form in self.stored.values())


def _size(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * int(np.prod(shape, dtype=np.int64))


@contextlib.contextmanager
def new_folder(folder: Path, size: int) -> Iterator[Path]:
    """Yields a temporary folder, which is renamed to `folder` at the end, or removed if an error occurs.

    size   bytes of tensors that will be written

    Raises UserError if `folder` exists, or if the disk is too small or cannot be written.
    """
    if folder.exists():
        raise UserError(f"{folder} exists. Choose another folder, or delete this one.")
    check_space(folder, size)
    partial = folder.with_name(f".{folder.name}.part")
    with claimed(partial):
        try:
            _empty(partial)
            yield partial
            partial.replace(folder)
        except OSError as error:
            raise cannot_write(folder, error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _empty(folder: Path) -> None:
    """Removes the content of a folder, which a killed process may have left."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_shards(
    folder: Path,
    tensors: list[FolderTensor],
    read: Callable[[FolderTensor], Iterable[np.ndarray]],
    on_tensor: Callable[[str, int], None] | None = None,
) -> None:
    """Writes model.safetensors, or several shards with an index. Memory holds one tensor.

    read        returns the arrays of a tensor, in the order of its `stored`
    on_tensor   called with name and bytes after each tensor
    """
    shards = list(_shards(tensors))
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        pairs = zip(names, shards, strict=True)
        weight_map = {name: file for file, shard in pairs for tensor in shard for name in tensor.stored}
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    for file, shard in zip(names, shards, strict=True):
        _write_shard(folder / file, shard, read, on_tensor)


def _shards(tensors: list[FolderTensor]) -> Iterator[list[FolderTensor]]:
    """Yields runs of tensors of at most SHARD_BYTES together, or of one tensor that is larger."""
    shard: list[FolderTensor] = []
    filled = 0
    for tensor in tensors:
        if shard and filled + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, filled = [], 0
        shard.append(tensor)
        filled += tensor.nbytes
    yield shard


def _write_shard(
    path: Path,
    tensors: list[FolderTensor],
    read: Callable[[FolderTensor], Iterable[np.ndarray]],
    on_tensor: Callable[[str, int], None] | None,
) -> None:
    """Writes a safetensors file: the length of the header, the header, then the arrays in the header's order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        for name, (dtype, shape) in tensor.stored.items():
            stop = start + _size(dtype, shape)
            header[name] = {"dtype": DTYPES[dtype.name], "shape": list(shape), "data_offsets": [start, stop]}
            start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with written_whole(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for array in read(tensor):
                file.write(np.ascontiguousarray(array).data)
            if on_tensor:
                on_tensor(tensor.name, tensor.nbytes)
