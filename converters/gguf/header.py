"""Reads the header of a GGUF file: its metadata, and where each tensor is. The tensors' bytes are not read.

    magic "GGUF", u32 version (2 or 3), u64 number of tensors, u64 number of keys
    per key       string name, u32 type of the value, value
    per tensor    string name, u32 dimensions, u64 sizes (fastest first), u32 type, u64 offset
    padding to general.alignment, then the tensors; the offsets count from the end of the padding

A string is a u64 length and UTF-8. gguf-py's reader is not used: it makes an array of every token, which takes seconds
for a vocabulary.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from lqexport.errors import UserError
from lqexport.storage.stand_ins import stand_in

# GGUF's codes for the types of metadata values: numbers with their NumPy dtypes, a string, an array.
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
IMAGE_PART = "clip"
"""`general.architecture` of a file with the part of a model that reads images."""


@dataclass(frozen=True)
class TensorData:
    """One tensor of a file: its shape (rows first), its GGUF type, and where its bytes are.

    begin        offset of its first byte in the file
    data_begin   offset of the file's first tensor by its header
    """

    shape: tuple[int, ...]
    tensor_type: str
    path: Path
    begin: int
    nbytes: int
    data_begin: int

    @property
    def data(self) -> NDArray[np.uint8]:
        """The tensor's bytes, mapped only while the array lives; a map of the whole file would count as memory."""
        return np.memmap(self.path, np.uint8, "r", self.begin, (self.nbytes,))


class TypedValue(NamedTuple):
    """A value of the metadata with GGUF's codes of its type and, of an array, of its elements' type (else None)."""

    value: Any
    type_code: int
    element_code: int | None


class _Cursor:
    """Reads the values of a header one after the other. Raises ValueError at the end of the file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.position = 0

    def take(self, size: int) -> bytes:
        self.position += size
        if self.position > self.size:
            raise ValueError(f"it ends at byte {self.size}, in the middle of its header")
        return self.file.read(size)

    def u32(self) -> int:
        return int(struct.unpack("<I", self.take(4))[0])

    def u64(self) -> int:
        return int(struct.unpack("<Q", self.take(8))[0])

    def string(self) -> str:
        return self.take(self.u64()).decode(errors="replace")

    def numbers(self, type_code: int, count: int) -> list[Any]:
        if type_code not in _NUMBERS:
            raise ValueError(f"a value has the unknown type {type_code}")
        dtype = np.dtype(_NUMBERS[type_code])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()

    def value(self) -> TypedValue:
        type_code = self.u32()
        if type_code == _STRING:
            return TypedValue(self.string(), type_code, None)
        if type_code != _ARRAY:
            return TypedValue(self.numbers(type_code, 1)[0], type_code, None)
        element, count = self.u32(), self.u64()
        values = [self.string() for _ in range(count)] if element == _STRING else self.numbers(element, count)
        return TypedValue(values, type_code, element)


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, TensorData]]:
    """Returns the metadata, and the tensors by name.

    Raises UserError if the file is missing, truncated, damaged or not GGUF.
    """
    metadata, tensors = _read(path)
    return {key: typed.value for key, typed in metadata.items()}, tensors


def read_typed(path: Path) -> dict[str, TypedValue]:
    """Returns the metadata with the types of the values. Raises UserError as `read_header` does."""
    return _read(path)[0]


def _read(path: Path) -> tuple[dict[str, TypedValue], dict[str, TensorData]]:
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                sentence = f"{path} is not a GGUF file: it does not begin with the letters GGUF."
                raise UserError(stand_in(path) or sentence)
            file.seek(0)
            return _parse(path, _Cursor(file, path.stat().st_size))
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise UserError(f"{path} is truncated or damaged: {error}. Copy or download it again.") from error


def _parse(path: Path, cursor: _Cursor) -> tuple[dict[str, TypedValue], dict[str, TensorData]]:
    cursor.take(4)
    if (version := cursor.u32()) not in (2, 3):
        raise ValueError(f"its version is {version}, not 2 or 3 of little-endian GGUF")
    tensor_count, key_count = cursor.u64(), cursor.u64()
    metadata: dict[str, TypedValue] = {}
    for _ in range(key_count):
        key = cursor.string()
        metadata[key] = cursor.value()
    infos = [_info(cursor) for _ in range(tensor_count)]
    alignment = metadata["general.alignment"].value if "general.alignment" in metadata else 32
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"its alignment is {alignment}")
    begin = -(-cursor.position // alignment) * alignment
    tensors = {
        name: TensorData(shape, ggml_type.name, path, begin + offset, _size(name, shape, ggml_type), begin)
        for name, shape, ggml_type, offset in infos
    }
    if len(tensors) != len(infos):
        raise ValueError("two of its tensors have the same name")
    _check_offsets(tensors, cursor.size)
    return metadata, tensors


def _check_offsets(tensors: dict[str, TensorData], size: int) -> None:
    """Raises ValueError if tensors overlap, or if one goes beyond the end of the file, which has `size` bytes."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].begin):
        if tensor.begin < end:
            raise ValueError("some of its tensors lie over each other")
        end = tensor.begin + tensor.nbytes
        if end > size:
            raise ValueError(f"it ends at byte {size}, but tensor {name} goes up to byte {end}")


def _info(cursor: _Cursor) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    name, dimensions = cursor.string(), cursor.u32()
    if not 1 <= dimensions <= 4:
        raise ValueError(f"tensor {name} has {dimensions} dimensions")
    shape = tuple(cursor.u64() for _ in range(dimensions))[::-1]
    if 0 in shape:
        raise ValueError(f"tensor {name} has the shape {list(shape)}")
    return name, shape, GGMLQuantizationType(cursor.u32()), cursor.u64()


def _size(name: str, shape: tuple[int, ...], ggml_type: GGMLQuantizationType) -> int:
    block, block_bytes = GGML_QUANT_SIZES[ggml_type]
    if shape[-1] % block:
        raise ValueError(f"{shape[-1]} columns of tensor {name} are not a multiple of {block}")
    return math.prod(shape) // block * block_bytes
