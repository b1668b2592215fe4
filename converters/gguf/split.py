"""Splits a GGUF model into several files as llama.cpp's gguf-split does, and reads such files.

Each file is a GGUF file with a run of the tensors and three keys. The first file also has the rest of the metadata. A
reader opens the first file and finds the others by their names.

    split.no              u16, number of the file, from 0
    split.count           u16, number of files
    split.tensors.count   i32, number of tensors in all files
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence, Set
from pathlib import Path
from typing import Any, Protocol, TypeVar

from gguf import Keys
from gguf.gguf_writer import SHARD_NAME_FORMAT

from lqexport.converters.gguf.header import TensorData, read_header
from lqexport.errors import UserError

ALIGNMENT = 32


class Sized(Protocol):
    """Anything with a size in bytes."""

    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Sized)


def padded(nbytes: int) -> int:
    """Returns a tensor's bytes with the padding behind them."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def in_files(tensors: Sequence[T], most: int | None) -> list[list[T]]:
    """Returns the tensors of each file, in order.

    A file takes tensors until their padded size would exceed `most` bytes, but at least one. None means one file.
    """
    files: list[list[T]] = [[]]
    filled = 0
    for tensor in tensors:
        size = padded(tensor.nbytes)
        if most is not None and files[-1] and filled + size > most:
            files.append([])
            filled = 0
        files[-1].append(tensor)
        filled += size
    return files


def is_gguf(path: Path) -> bool:
    """Returns whether a path has the suffix .gguf, in any case."""
    return path.suffix.lower() == ".gguf"


def split_paths(path: Path, count: int) -> list[Path]:
    """Returns the paths of a model's files: `path` itself, or model-00001-of-00003.gguf and so on beside it."""
    if count == 1:
        return [path]
    stem = path.stem if is_gguf(path) else path.name
    return [path.with_name(SHARD_NAME_FORMAT.format(stem, number, count)) for number in range(1, count + 1)]


def read_split(path: Path) -> tuple[dict[str, Any], dict[str, TensorData], list[Path]]:
    """Returns metadata, tensors by name, and files of a model, by its only or its first file.

    Raises UserError as `read_header` does, if `path` is not the first file of a split model, if another is missing, or
    if the files do not belong together.
    """
    metadata, tensors = read_header(path)
    count = metadata.get(Keys.Split.LLM_KV_SPLIT_COUNT, 1)
    if not isinstance(count, int) or count < 2:
        return metadata, tensors, [path]
    paths = _split_files(path, metadata, count)
    if missing := next((part for part in paths if not part.is_file()), None):
        raise UserError(
            f"{missing} is missing: the model is split into {count} files, which lie beside each other. Copy or "
            "download it."
        )
    for number, next_path in enumerate(paths[1:], 1):
        tensors |= _tensors_of_file(next_path, number, count, tensors.keys())
    if len(tensors) != metadata.get(Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT):
        raise UserError(
            f"{path} and the {count - 1} files beside it hold {len(tensors)} tensors, not the "
            f"{metadata.get(Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT)} that it says. Copy or download them again."
        )
    return metadata, tensors, paths


def _split_files(path: Path, metadata: dict[str, Any], count: int) -> list[Path]:
    """Returns the files of a split model by its first file. Raises UserError if `path` is not the first file."""
    number = metadata.get(Keys.Split.LLM_KV_SPLIT_NO)
    if not isinstance(number, int) or not 0 <= number < count < 1 << 16:
        raise UserError(f"{path} is damaged: it says that it is number {number} of {count} files, counted from 0.")
    stem = re.fullmatch(rf"(.*)-{number + 1:05}-of-{count:05}\.gguf", path.name, re.IGNORECASE)
    if stem is None:
        raise UserError(
            f"{path} is one of the {count} files of a split model, renamed: the first must be called like "
            f"model-00001-of-{count:05}.gguf."
        )
    paths = [part.with_suffix(path.suffix) for part in split_paths(path.with_name(f"{stem[1]}.gguf"), count)]
    if number != 0:
        advice = f"give {paths[0].name}" + ("" if paths[0].is_file() else ", which is missing beside it")
        raise UserError(f"{path} is not the first of the {count} files of a split model: {advice}.")
    return paths


def _tensors_of_file(path: Path, number: int, count: int, earlier: Set[str]) -> dict[str, TensorData]:
    """Returns the tensors of a file behind the first. Raises UserError if it is of another model.

    earlier   names of the tensors in the files before
    """
    metadata, tensors = read_header(path)
    position = (metadata.get(Keys.Split.LLM_KV_SPLIT_NO), metadata.get(Keys.Split.LLM_KV_SPLIT_COUNT))
    if position != (number, count) or tensors.keys() & earlier:
        raise UserError(f"{path} is not file {number + 1} of {count} of this model. Copy or download it again.")
    return tensors


def is_later_part(path: Path, among: Collection[Path]) -> bool:
    """Returns whether a path is called like a later file of a split model whose first file is in `among`."""
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name, re.IGNORECASE)
    if match is None or match[2] == "00001":
        return False
    return path.with_name(f"{match[1]}-00001-of-{match[3]}{path.suffix}") in among
