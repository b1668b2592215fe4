"""Writes an artifact's tensors into a GGUF file, of a model or an adapter, without changing their bytes.

It takes two passes, so that memory holds one tensor at a time. First the header is written: the manifest gives every
name, type and size. Then the tensors are read, checked against the manifest's digests and written one by one.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.gguf_writer import WriterState

from lqexport.converters.gguf.scales import scale_name
from lqexport.converters.gguf.split import ALIGNMENT, in_files, padded, split_paths
from lqexport.converters.models.architecture import Order
from lqexport.converters.models.tensor_names import place_in_stack
from lqexport.converters.plan import rows_and_columns
from lqexport.errors import UserError
from lqexport.formats.codec import WHOLE, nbytes
from lqexport.formats.registry import codec_named
from lqexport.storage.artifact import Artifact, StoredTensor
from lqexport.storage.files import check_space, written_whole


class StoredModel(Protocol):
    """An artifact, finished or planned: what the content of a file is made of. See `Artifact` for the methods."""

    @property
    def folder(self) -> Path: ...
    @property
    def model_folder(self) -> Path: ...
    def run(self) -> dict[str, Any]: ...
    def config(self) -> dict[str, Any]: ...
    def manifest(self) -> dict[str, dict[str, Any]]: ...
    def read_listed(self, name: str, codec: str, shape: tuple[int, ...], sha256: str) -> StoredTensor: ...


GGUF_FAMILIES = ("gguf", "gguf-norm", "gguf-decay", "gguf-whole", "gguf-scaled")
"""The families of codecs whose bytes are those of a GGUF type."""
BLOCKS = "blocks"
"""The plane that holds the bytes of a GGUF type."""
SMALL = "gguf:Q4_0"
"""The codec of matrices of zeros."""


@dataclass(frozen=True)
class GGUFEntry:
    """One tensor of the artifact and its place in the file: its names, its codec, and the manifest's shape and digest.

    order        the Hugging Face row that each GGUF row holds; None where both have the same order
    gguf_shape   its shape in the file, rows first
    """

    name: str
    gguf_name: str
    codec_name: str
    shape: tuple[int, ...]
    sha256: str
    order: Order | None
    gguf_shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return sum(self.planes().values())

    def planes(self) -> dict[str, int]:
        """Returns the bytes of each plane of the tensor: its blocks, and WHOLE if it has that."""
        layout = codec_named(self.codec_name).layout(*rows_and_columns(self.shape))
        return {plane: dtype.itemsize * math.prod(shape) for plane, (dtype, shape) in layout.items()}


def file_entry(
    name: str, gguf_name: str, facts: dict[str, Any], order: Order | None, gguf_shape: tuple[int, ...] | None = None
) -> GGUFEntry:
    """Returns the entry of a tensor from its `facts` in the manifest.

    gguf_shape   its shape in the file; None for its shape in the manifest
    """
    shape = tuple(facts["shape"])
    return GGUFEntry(name, gguf_name, facts["codec"], shape, facts["sha256"], order, gguf_shape or shape)


def type_of(codec_name: str) -> str:
    """Returns the GGUF type of a codec's bytes: `Q4_K` for `gguf:Q4_K`, `F32` for `gguf-norm:F32`."""
    return codec_name.rpartition(":")[2]


def check_types(entries: list[GGUFEntry], folder: Path, advice: str) -> None:
    """Raises UserError, which ends with `advice`, if a tensor is not stored in a GGUF type."""
    foreign = [entry for entry in entries if entry.codec_name.partition(":")[0] not in GGUF_FAMILIES]
    if foreign:
        raise UserError(
            f"{folder} cannot become a GGUF file by moving bytes: {len(foreign)} of its tensors are not "
            f"stored in a GGUF type (such as {foreign[0].name} in {foreign[0].codec_name}). {advice}"
        )


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file: an entry, the entries of a block's experts, or an array that holds its bytes.

    plane   the plane of the entries that the tensor holds
    """

    name: str
    shape: tuple[int, ...]
    codec_name: str
    entries: list[GGUFEntry]
    values: np.ndarray | None = None
    plane: str = BLOCKS

    @property
    def nbytes(self) -> int:
        return sum(entry.planes()[self.plane] for entry in self.entries) if self.values is None else self.values.nbytes


@dataclass(frozen=True)
class FileContent:
    """The content of a file: the metadata that `writer` has, and tensors in the file's order."""

    writer: GGUFWriter
    tensors: list[_Tensor]

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors, with the padding behind each."""
        return sum(padded(tensor.nbytes) for tensor in self.tensors)

    def header(self) -> bytes:
        """Returns the bytes of the file before those of its tensors."""
        file = io.BytesIO()
        write_headers(self.writer, [file], [self.tensors])
        return file.getvalue()


def file_content(
    writer: GGUFWriter,
    entries: list[GGUFEntry],
    computed: dict[str, np.ndarray] | None = None,
    zeros: dict[str, tuple[int, ...]] | None = None,
) -> FileContent:
    """Returns the content of a file: the metadata of `writer`, the entries, then the `computed` float32 tensors.

    zeros   shapes of tensors of zeros that come last

    Raises UserError if the experts of a block differ in shape or codec.
    """
    stacks: dict[str, list[GGUFEntry]] = {}
    for entry in entries:
        stacks.setdefault(entry.gguf_name, []).append(entry)
    tensors = [tensor for name, stack in stacks.items() for tensor in _with_scale(name, stack)]
    tensors += [_Tensor(name, values.shape, "gguf:F32", [], values) for name, values in (computed or {}).items()]
    tensors += [_zeros(name, shape) for name, shape in (zeros or {}).items()]
    return FileContent(writer, tensors)


def write_content(
    artifact: Artifact,
    path: Path,
    content: FileContent,
    on_tensor: Callable[[str, int], None] | None,
    split_max_size: int | None = None,
) -> list[Path]:
    """Writes the content of a file, whose tensors the artifact holds, whole or not at all.

    split_max_size   bytes of tensors that one file may hold; a larger model becomes several files (see `split.py`),
                     which appear only when all of them are whole

    Returns the files. Raises UserError if a tensor does not match the manifest, or if the disk is too small.
    """
    split = in_files(content.tensors, split_max_size)
    paths = split_paths(path, len(split))
    check_space(path, sum(tensor.nbytes for tensor in content.tensors))
    with contextlib.ExitStack() as opened:  # it closes the first file last
        files = [opened.enter_context(written_whole(file_path)) for file_path in paths]
        write_headers(content.writer, files, split)
        wholes: dict[str, np.ndarray] = {}
        for file, tensor in ((file, tensor) for file, of_file in zip(files, split, strict=True) for tensor in of_file):
            _write_tensor(artifact, file, tensor, wholes, on_tensor)
    return paths


def _with_scale(name: str, stack: list[GGUFEntry]) -> list[_Tensor]:
    """Returns the tensor of one entry or of a block's experts, and that of their further scales, if they have some.

    Raises UserError if the experts of a block differ in shape or codec.
    """
    tensor = _Tensor(name, _shape(stack), stack[0].codec_name, stack)
    if WHOLE not in stack[0].planes():
        return [tensor]
    return [tensor, _Tensor(scale_name(name), (len(stack),), "gguf:F32", stack, plane=WHOLE)]


def _zeros(name: str, shape: tuple[int, ...]) -> _Tensor:
    """Returns a tensor of zeros: a matrix in a small type whose zero bytes are zeros, if its columns fit."""
    small = len(shape) == 2 and shape[1] % codec_named(SMALL).block == 0
    codec_name = SMALL if small else "gguf:F32"
    size = nbytes(codec_named(codec_name), *rows_and_columns(shape))
    return _Tensor(name, shape, codec_name, [], np.zeros(size, np.uint8))


def write_arrays(path: Path, writer: GGUFWriter, arrays: dict[str, np.ndarray]) -> None:
    """Writes the metadata of `writer` and float32 arrays as a GGUF file, whole or not at all."""
    tensors = [_Tensor(name, values.shape, "gguf:F32", [], values) for name, values in arrays.items()]
    with written_whole(path) as file:
        write_headers(writer, [file], [tensors])
        for tensor in tensors:
            _write_values(file, tensor)


def write_metadata(writer: GGUFWriter, path: Path) -> None:
    """Writes the metadata of `writer` as a GGUF file without tensors, whole or not at all."""
    with written_whole(path) as file:
        write_headers(writer, [file], [[]])


def _write_tensor(
    artifact: Artifact,
    file: BinaryIO,
    tensor: _Tensor,
    wholes: dict[str, np.ndarray],
    on_tensor: Callable[[str, int], None] | None,
) -> None:
    """Writes a tensor. `wholes` takes the planes WHOLE of its entries, which are the next tensor."""
    for entry in tensor.entries:
        if tensor.plane == WHOLE:
            _write_array(file, wholes.pop(entry.name))
            continue
        stored = artifact.read_listed(entry.name, entry.codec_name, entry.shape, entry.sha256)
        _write_array(file, _permuted(stored, entry.order))
        wholes |= {entry.name: stored.planes[WHOLE]} if WHOLE in stored.planes else {}
        if on_tensor:
            on_tensor(entry.name, entry.nbytes)
    _write_values(file, tensor)


def _write_values(file: BinaryIO, tensor: _Tensor) -> None:
    """Writes computed values, if the tensor has some, and pads it."""
    if tensor.values is not None:
        _write_array(file, tensor.values)
    file.write(bytes(-tensor.nbytes % ALIGNMENT))


def _shape(stack: list[GGUFEntry]) -> tuple[int, ...]:
    """Returns the shape of a file's tensor: that of its one entry, or [experts, rows, columns].

    Raises UserError if the experts of a block differ in shape or codec.
    """
    first = stack[0]
    if place_in_stack(first.name) is None:
        return first.gguf_shape
    if different := [entry for entry in stack if (entry.codec_name, entry.shape) != (first.codec_name, first.shape)]:
        raise UserError(
            f"llama.cpp stores the experts of a block in one type: {first.name} is in {first.codec_name}, and "
            f"{different[0].name} in {different[0].codec_name}."
        )
    return (len(stack), *first.shape)


class FileTensor(Protocol):
    """A tensor as the header of a file describes it."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def codec_name(self) -> str: ...
    @property
    def nbytes(self) -> int: ...


def write_headers(writer: GGUFWriter, files: Sequence[BinaryIO], split: Sequence[Sequence[FileTensor]]) -> None:
    """Writes header, metadata and tensor infos by gguf-py, into files that are already open."""
    writer.tensors, writer.state = [], WriterState.NO_FILE  # it may have written a header before
    for of_file in split:
        writer.tensors.append({})
        for tensor in of_file:
            ggml_type = GGMLQuantizationType[type_of(tensor.codec_name)]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=ggml_type)
    writer.fout, writer.state = list(files), WriterState.EMPTY  # type: ignore[arg-type]  # it only writes to them
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for file in files:
        writer.write_padding(file, file.tell())


def _write_array(file: BinaryIO, array: np.ndarray) -> None:
    # gguf-py's write_tensor_data calls numpy's tofile, which hides why a write failed. A full disk must be reported.
    file.write(np.ascontiguousarray(array).data)


def write_padded(file: BinaryIO, array: np.ndarray) -> None:
    """Writes a tensor's bytes, and zeros up to where the next one begins."""
    _write_array(file, array)
    file.write(bytes(-array.nbytes % ALIGNMENT))


def _permuted(tensor: StoredTensor, order: Order | None) -> np.ndarray:
    """Returns the blocks of a GGUF tensor [rows, bytes], with its rows (a bias: its elements) in `order`."""
    rows = tensor.planes[BLOCKS].reshape(tensor.shape[0], -1)
    return rows if order is None else rows[order]
