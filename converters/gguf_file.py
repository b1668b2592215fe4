"""Putting an artifact's tensors into a GGUF file, a model's or an adapter's: only bytes move.

Two passes, so that memory holds one tensor at a time: the manifest gives every name, type and size for the header, then
tensors are read, checked against the manifest's digests and written one after the other.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.gguf_writer import WriterState

from lqexport.artifact import Artifact, StoredTensor, digest, written_whole
from lqexport.converters.rope import rope_order
from lqexport.errors import UserError
from lqexport.formats.codec import nbytes
from lqexport.formats.registry import codec


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: its names, its type, and what the manifest says of it.

    heads   by how many heads llama.cpp interleaves its rows; None where it does not
    """

    name: str
    gguf_name: str
    codec: str
    shape: tuple[int, ...]
    sha256: str
    heads: int | None

    @property
    def nbytes(self) -> int:
        rows, columns = self.shape if len(self.shape) == 2 else (1, self.shape[0])
        return nbytes(codec(self.codec), rows, columns)


def file_entry(name: str, gguf_name: str, facts: dict[str, Any], heads: int | None) -> Entry:
    """From what the manifest says of a tensor."""
    return Entry(name, gguf_name, facts["codec"], tuple(facts["shape"]), facts["sha256"], heads)


def check_types(entries: list[Entry], folder: Path, advice: str) -> None:
    """Raises UserError, with `advice` at its end, where a tensor is not stored in a GGUF type."""
    foreign = [entry for entry in entries if not entry.codec.startswith("gguf:")]
    if foreign:
        raise UserError(
            f"{folder} cannot become a GGUF file by moving bytes: {len(foreign)} of its tensors are not "
            f"stored in a GGUF type (such as {foreign[0].name} in {foreign[0].codec}). {advice}"
        )


def write_tensors(
    artifact: Artifact,
    path: Path,
    writer: GGUFWriter,
    entries: list[Entry],
    on_tensor: Callable[[str, int], None] | None,
    computed: dict[str, np.ndarray] | None = None,
) -> None:
    """Write the file, whole or not at all: the writer's metadata, then the entries, then `computed` float32 tensors.

    Raises UserError where a tensor is not the manifest's, and where the disk is too small.
    """
    computed = computed or {}
    for entry in entries:
        _announce(writer, entry.gguf_name, entry.shape, entry.codec, entry.nbytes)
    for name, values in computed.items():
        _announce(writer, name, values.shape, "gguf:F32", values.nbytes)
    _check_space(path, sum(entry.nbytes for entry in entries))
    with written_whole(path) as file:
        _write_header(writer, file)
        for entry in entries:
            _write_blob(file, _blob(artifact, entry))
            if on_tensor:
                on_tensor(entry.name, entry.nbytes)
        for values in computed.values():
            _write_blob(file, values)


def _announce(writer: GGUFWriter, name: str, shape: tuple[int, ...], codec_name: str, size: int) -> None:
    kind = GGMLQuantizationType[codec_name.removeprefix("gguf:")]
    writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)


def _check_space(path: Path, size: int) -> None:
    """Raises UserError where the disk has no room for `size` bytes of tensors and as much metadata as any model has."""
    place = next(parent for parent in path.absolute().parents if parent.is_dir())
    needed, free = size + 2**25, shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{path} needs {needed / 1e9:.2f} GB, but {place} has {free / 1e9:.2f} GB free. "
            "Free some space or write to another disk."
        )


def _write_header(writer: GGUFWriter, file: BinaryIO) -> None:
    """Header, metadata and tensor infos by gguf-py, into a file that is already open."""
    writer.fout, writer.state = [file], WriterState.EMPTY  # type: ignore[list-item]  # it only writes to it
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_padding(file, file.tell())


def _write_blob(file: BinaryIO, blob: np.ndarray) -> None:
    # Not gguf-py's write_tensor_data: numpy's tofile hides why a write failed, and a full disk should be named.
    file.write(np.ascontiguousarray(blob).data)
    file.write(bytes(-blob.nbytes % 32))


def _blob(artifact: Artifact, entry: Entry) -> np.ndarray:
    """The tensor's bytes in the file's row order, after the digest was checked."""
    tensor = artifact.read(entry.name)
    if (tensor.codec, tensor.shape, digest(tensor.planes)) != (entry.codec, entry.shape, entry.sha256):
        raise UserError(
            f"Tensor {entry.name} in {artifact.folder} is not the one that its manifest lists: the artifact is "
            "damaged. Delete the tensor's file and run the same quantize command again."
        )
    return permuted(tensor, entry.heads)


def permuted(tensor: StoredTensor, heads: int | None) -> np.ndarray:
    """The one plane of a GGUF tensor, uint8 [rows, bytes], its rows (of a bias: its elements) in llama.cpp's order."""
    (plane,) = tensor.planes.values()
    rows = plane.reshape(tensor.shape[0], -1)
    return rows if heads is None else rows[rope_order(len(rows), heads)]
