"""Rewrites GGUF files with other metadata or tensors, to make wrong files of right ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType


@dataclass
class Content:
    """The content of a GGUF file, to be changed and written again.

    values    key -> value
    types     key -> type of the value, and of its items
    tensors   name -> bytes [rows ..., bytes of a row] or numbers
    forms     name -> type of the tensor
    """

    values: dict[str, Any] = field(default_factory=dict)
    types: dict[str, tuple[GGUFValueType, GGUFValueType | None]] = field(default_factory=dict)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    forms: dict[str, GGMLQuantizationType] = field(default_factory=dict)

    def add(self, key: str, value: Any, value_type: GGUFValueType) -> None:
        """Adds a key or gives it another value."""
        self.values[key], self.types[key] = value, (value_type, None)


Spoil = Callable[[Content], None]


def content_of(path: Path) -> Content:
    """Returns the content of a file."""
    reader, content = gguf.GGUFReader(path), Content()
    for key, value in reader.fields.items():
        if not key.startswith("GGUF."):
            content.values[key] = value.contents()
            content.types[key] = (value.types[0], value.types[-1] if value.types[0] == GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        content.tensors[tensor.name], content.forms[tensor.name] = np.array(tensor.data), tensor.tensor_type
    return content


def rewritten(path: Path, to: Path, spoil: Spoil) -> Path:
    """Writes the content of the file `path`, changed by `spoil`, to the file `to`, and returns that."""
    content = content_of(path)
    spoil(content)
    to.parent.mkdir(exist_ok=True, parents=True)
    writer = gguf.GGUFWriter(to, content.values.get("general.architecture", "llama"))
    writer.kv_data[0].clear()
    for key, value in content.values.items():
        if isinstance(value, list) and not value:
            continue
        writer.add_key_value(key, value, *content.types[key])
    for name, data in content.tensors.items():
        writer.add_tensor(name, data, raw_dtype=content.forms[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to
