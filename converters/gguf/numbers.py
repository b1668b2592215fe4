"""Numbers of blocks that checkpoints have as tensors, and GGUF files as arrays of the metadata (`numbers` of an entry).

A GGUF file that is read has a tensor for each of them, under the name `blk.N.KEY`, as if the file held it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from numpy.typing import NDArray

from lqexport.converters.gguf.file import GGUFEntry, StoredModel
from lqexport.converters.gguf.header import TensorData
from lqexport.converters.models.architecture import Architecture
from lqexport.formats.registry import codec_named


@dataclass(frozen=True)
class Number(TensorData):
    """A number of the metadata as a float32 tensor of one value."""

    value: float

    @property
    def data(self) -> NDArray[np.uint8]:
        """The bytes of the value."""
        return np.array([self.value], np.float32).view(np.uint8)


def with_numbers(
    tensors: Mapping[str, TensorData], metadata: Mapping[str, Any], entries: Iterable[Architecture]
) -> dict[str, TensorData]:
    """Returns a file's tensors, and one for each number of a block that its metadata has.

    entries   those of the file's architecture
    """
    result = dict(tensors)
    for key in {key for entry in entries for key in entry.numbers.values()}:
        values = metadata.get(key)
        for block, value in enumerate(values if isinstance(values, list) else []):
            if isinstance(value, float):
                result[f"blk.{block}.{key}"] = Number((1,), "F32", Path(), 0, 4, 0, value)
    return result


def add_numbers(
    writer: GGUFWriter, stored: StoredModel, architecture: Architecture, entries: list[GGUFEntry]
) -> list[GGUFEntry]:
    """Adds the numbers of all blocks to `writer`. Returns the entries of the other tensors."""
    keys = set(architecture.numbers.values())
    arrays: dict[str, list[float]] = {}
    others = []
    for entry in entries:
        if (key := entry.gguf_name.split(".", 2)[-1]) not in keys:
            others.append(entry)
            continue
        tensor = stored.read_listed(entry.name, entry.codec_name, entry.shape, entry.sha256)
        value = codec_named(entry.codec_name).decode(tensor.planes, 1)
        arrays.setdefault(key, []).append(float(value.reshape(())))
    for key, values in arrays.items():
        writer.add_array(key, values)
    return others
