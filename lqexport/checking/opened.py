"""A GGUF file as its header describes it: metadata and tensors, with no table of architectures behind it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lqexport.converters.gguf.block_types import first_borrower, first_further, values_per_block
from lqexport.converters.gguf.header import IMAGE_PART, TensorData
from lqexport.converters.gguf.split import read_split
from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.architectures import entries_of_gguf


@dataclass(frozen=True)
class OpenFile:
    """The header of a GGUF file, or of all files of a split model.

    path       the file, or the first file of a split model
    metadata   every key of the (first) file, as Python values
    tensors    GGUF name -> tensor, in the order of the files
    paths      all files
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorData]
    paths: list[Path]

    @property
    def architecture(self) -> str:
        """`general.architecture`; empty where the file does not say it."""
        name = self.metadata.get("general.architecture")
        return name if isinstance(name, str) else ""

    @property
    def is_model(self) -> bool:
        """Whether the file holds a language model, and not an adapter, an importance matrix or an image encoder."""
        return self.metadata.get("general.type", "model") == "model" and self.architecture != IMAGE_PART

    @cached_property
    def entries(self) -> list[Architecture]:
        """Our entries for the file's architecture, with one expert in place of all. Empty where we have none."""
        experts, leading = self.count("expert_count") or 0, self.count("leading_dense_block_count") or 0
        named = entries_of_gguf(self.architecture)
        fitting = [entry for entry in named if bool(entry.experts) == bool(experts)] or named
        return [
            entry.expanded(
                1,
                leading,
                values_per_block(entry, self.tensors),
                first_borrower(entry, self.metadata),
                first_further(entry, self.metadata),
            )
            for entry in fitting
        ]

    def get(self, key: str) -> Any:
        """Returns the value of an architecture's key, such as `block_count` for `llama.block_count`, or None."""
        return self.metadata.get(f"{self.architecture}.{key}")

    def number(self, key: str) -> float | None:
        """Returns a finite number by its key; None where the file has no such number."""
        value = self.get(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return value if is_number and math.isfinite(value) else None

    def count(self, key: str) -> int | None:
        """Returns a positive integer by its key; None where the file has no such number."""
        value = self.number(key)
        return value if isinstance(value, int) and value > 0 else None

    def strings(self, key: str) -> list[str] | None:
        """Returns a list of texts by its full key; None where the file has no such list."""
        value = self.metadata.get(key)
        return value if isinstance(value, list) and all(isinstance(text, str) for text in value) else None


def open_file(path: Path) -> OpenFile:
    """Opens a GGUF file, or a split model by its first file. Raises UserError as `read_split` does."""
    metadata, tensors, paths = read_split(path)
    return OpenFile(path, metadata, tensors, paths)
