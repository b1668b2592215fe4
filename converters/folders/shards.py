"""Writing a folder of safetensors shards, tensor by tensor, whole or not at all."""

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
"""Most bytes of a shard's tensors, as transformers has it."""
DTYPES = {"uint8": "U8", "int16": "I16", "int32": "I32", "int64": "I64", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Part:
    """A tensor of the model and what the folder stores of it: name in the file -> dtype and shape."""

    name: str
    stored: dict[str, tuple[np.dtype, tuple[int, ...]]]

    @property
    def nbytes(self) -> int:
        return sum(_size(*form) for form in self.stored.values())


def _size(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * int(np.prod(shape, dtype=np.int64))


@contextlib.contextmanager
def new_folder(folder: Path, size: int) -> Iterator[Path]:
    """A folder to fill with `size` bytes of tensors, which becomes `folder` when all went well and is gone otherwise.

    Raises UserError where the folder exists, and where the disk is too small or cannot be written.
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
    """Remove what a killed process left in it."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_shards(
    folder: Path,
    parts: list[Part],
    read: Callable[[Part], Iterable[np.ndarray]],
    on_tensor: Callable[[str, int], None] | None = None,
) -> None:
    """model.safetensors, or several of them with an index. Memory holds one part.

    read        a part's arrays, in the order of `stored`
    on_tensor   called with name and bytes after each part
    """
    shards = list(_shards(parts))
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        pairs = zip(names, shards, strict=True)
        where = {name: file for file, shard in pairs for part in shard for name in part.stored}
        total = sum(part.nbytes for part in parts)
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    for file, shard in zip(names, shards, strict=True):
        _write_shard(folder / file, shard, read, on_tensor)


def _shards(parts: list[Part]) -> Iterator[list[Part]]:
    """Runs of parts of at most SHARD_BYTES, or of one part."""
    shard: list[Part] = []
    filled = 0
    for part in parts:
        if shard and filled + part.nbytes > SHARD_BYTES:
            yield shard
            shard, filled = [], 0
        shard.append(part)
        filled += part.nbytes
    yield shard


def _write_shard(
    path: Path,
    parts: list[Part],
    read: Callable[[Part], Iterable[np.ndarray]],
    on_tensor: Callable[[str, int], None] | None,
) -> None:
    """A safetensors file: length of the header, header, then the arrays in its order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for part in parts:
        for name, (dtype, shape) in part.stored.items():
            stop = start + _size(dtype, shape)
            header[name] = {"dtype": DTYPES[dtype.name], "shape": list(shape), "data_offsets": [start, stop]}
            start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with written_whole(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            for array in read(part):
                file.write(np.ascontiguousarray(array).data)
            if on_tensor:
                on_tensor(part.name, part.nbytes)
