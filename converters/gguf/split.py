"""A GGUF model in several files, as llama.cpp's gguf-split writes them: each is a GGUF file of its own with some of the
tensors, in their order, and three keys; the first has the rest of the metadata too. Whoever opens the first finds the
others by their names.

    split.no              u16, number of the file, from 0
    split.count           u16, how many files there are
    split.tensors.count   i32, tensors of all files together
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any, Protocol, TypeVar

from gguf import Keys
from gguf.gguf_writer import SHARD_NAME_FORMAT

from lqexport.converters.gguf.header import TensorData, read_header
from lqexport.errors import UserError

ALIGNMENT = 32


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Sized)


def in_files(tensors: Sequence[T], most: int | None) -> list[list[T]]:
    """Tensors by file: each file takes, in order, what fits into `most` bytes of padded tensors, and at least one."""
    files: list[list[T]] = [[]]
    filled = 0
    for tensor in tensors:
        size = -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if most is not None and files[-1] and filled + size > most:
            files.append([])
            filled = 0
        files[-1].append(tensor)
        filled += size
    return files


def split_paths(path: Path, count: int) -> list[Path]:
    """The files of a model called `path`: that one, or for example model-00001-of-00003.gguf and so on."""
    if count == 1:
        return [path]
    stem = path.name.removesuffix(".gguf")
    return [path.with_name(SHARD_NAME_FORMAT.format(stem, number, count)) for number in range(1, count + 1)]


def read_split(path: Path) -> tuple[dict[str, Any], dict[str, TensorData], list[Path]]:
    """Metadata, tensors by name and files of a model, whole or split, by its first file.

    Raises UserError as `read_header`, where `path` is another file of a split model, and where the files do not belong
    together.
    """
    metadata, tensors = read_header(path)
    count = metadata.get(Keys.Split.LLM_KV_SPLIT_COUNT, 1)
    if not isinstance(count, int) or count < 2:
        return metadata, tensors, [path]
    paths = _beside(path, metadata, count)
    for number, other in enumerate(paths[1:], 1):
        tensors |= _part(other, number, count, tensors.keys())
    if len(tensors) != metadata.get(Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT):
        raise UserError(
            f"{path} and the {count - 1} files beside it hold {len(tensors)} tensors, not the "
            f"{metadata.get(Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT)} that it says. Copy or download them again."
        )
    return metadata, tensors, paths


def _beside(path: Path, metadata: dict[str, Any], count: int) -> list[Path]:
    """The files of a split model, by the name of the first."""
    number = metadata.get(Keys.Split.LLM_KV_SPLIT_NO)
    if not isinstance(number, int) or not 0 <= number < count < 1 << 16:
        raise UserError(f"{path} is damaged: it says that it is number {number} of {count} files, counted from 0.")
    stem = re.fullmatch(rf"(.*)-{number + 1:05}-of-{count:05}\.gguf", path.name)
    if stem is None:
        raise UserError(
            f"{path} is one of the {count} files of a split model, renamed: the first must be called like "
            f"model-00001-of-{count:05}.gguf."
        )
    paths = split_paths(path.with_name(f"{stem[1]}.gguf"), count)
    if number != 0:
        raise UserError(f"{path} is not the first of the {count} files of a split model: give {paths[0].name}.")
    return paths


def _part(path: Path, number: int, count: int, known: Set[str]) -> dict[str, TensorData]:
    """Tensors of another file than the first. Raises UserError where it is not of the same model."""
    metadata, tensors = read_header(path)
    said = (metadata.get(Keys.Split.LLM_KV_SPLIT_NO), metadata.get(Keys.Split.LLM_KV_SPLIT_COUNT))
    if said != (number, count) or tensors.keys() & known:
        raise UserError(f"{path} is not file {number + 1} of {count} of this model. Copy or download it again.")
    return tensors
