"""Writing an artifact as a GGUF file. Only bytes move: planes are stored as they are, rows of rotated linears permuted.

Two passes, so that memory holds one tensor at a time: the manifest gives every name, type and size for the header, then
tensors are read, checked against the manifest's digests and written one after the other.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.gguf_writer import WriterState

from lqexport.artifact import Artifact, StoredTensor, digest, written_whole
from lqexport.converters.architectures import Architecture, architecture_of
from lqexport.converters.gguf_metadata import add_model, add_provenance
from lqexport.converters.gguf_tokenizer import add_tokenizer
from lqexport.converters.rope import ROPE_FACTORS, llama3_factors, rope_heads, rope_order, rope_settings
from lqexport.converters.tensor_names import gguf_names
from lqexport.errors import UserError
from lqexport.formats.codec import nbytes
from lqexport.formats.registry import codec


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file: its names, its type, and what the manifest says of it."""

    name: str
    gguf_name: str
    codec: str
    shape: tuple[int, ...]
    sha256: str

    @property
    def nbytes(self) -> int:
        rows, columns = self.shape if len(self.shape) == 2 else (1, self.shape[0])
        return nbytes(codec(self.codec), rows, columns)


def write(artifact: Artifact, path: Path, on_tensor: Callable[[str, int], None] | None = None) -> None:
    """Write a finished artifact to `path`, whole or not at all. Equal artifacts give equal bytes.

    on_tensor   called with name and bytes after each tensor

    Raises UserError where the artifact is unfinished, damaged or not of GGUF codecs, where llama.cpp lacks what the
    model or its tokenizer needs, and where the disk is too small.
    """
    config = artifact.config()
    architecture = architecture_of(config)
    entries = _entries(artifact, architecture, config)
    factors = llama3_factors(config) if rope_settings(config)["rope_type"] == "llama3" else None
    writer = GGUFWriter(None, architecture.gguf)
    add_provenance(writer, artifact.run(), _most_weights(entries))
    rows = next(entry.shape[0] for entry in entries if entry.name == architecture.embedding)
    add_model(writer, config, rows)
    add_tokenizer(writer, artifact.model_folder, rows)
    for entry in entries:
        _announce(writer, entry.gguf_name, entry.shape, entry.codec, entry.nbytes)
    if factors is not None:
        _announce(writer, ROPE_FACTORS, factors.shape, "gguf:F32", factors.nbytes)
    _check_space(path, sum(entry.nbytes for entry in entries))
    with written_whole(path) as file:
        _write_header(writer, file)
        for entry in entries:
            _write_blob(file, _blob(artifact, architecture, config, entry))
            if on_tensor:
                on_tensor(entry.name, entry.nbytes)
        if factors is not None:
            _write_blob(file, factors)


def _most_weights(entries: list[_Entry]) -> str:
    """The type that holds most bytes of the blocks' matrices."""
    total: Counter[str] = Counter()
    for entry in entries:
        if len(entry.shape) == 2 and entry.gguf_name.startswith("blk."):
            total[entry.codec.removeprefix("gguf:")] += entry.nbytes
    return total.most_common(1)[0][0]


def _entries(artifact: Artifact, architecture: Architecture, config: dict[str, Any]) -> list[_Entry]:
    known = gguf_names(architecture, config["num_hidden_layers"])
    entries = []
    for name, facts in artifact.manifest().items():
        if name not in known:
            raise UserError(f"{artifact.folder} holds a tensor {name} that {architecture.gguf} does not have in GGUF.")
        entries.append(_Entry(name, known[name], facts["codec"], tuple(facts["shape"]), facts["sha256"]))
    foreign = [entry for entry in entries if not entry.codec.startswith("gguf:")]
    if foreign:
        raise UserError(
            f"{artifact.folder} cannot become a GGUF file by moving bytes: {len(foreign)} of its tensors are not "
            f"stored in a GGUF type (such as {foreign[0].name} in {foreign[0].codec}). Quantize again with a target "
            "gguf:TYPE."
        )
    if architecture.embedding not in {entry.name for entry in entries}:
        raise UserError(f"{artifact.folder} has no tensor {architecture.embedding}.")
    return entries


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


def _blob(artifact: Artifact, architecture: Architecture, config: dict[str, Any], entry: _Entry) -> np.ndarray:
    """The tensor's bytes in the file's row order, after the digest was checked."""
    tensor = artifact.read(entry.name)
    if (tensor.codec, tensor.shape, digest(tensor.planes)) != (entry.codec, entry.shape, entry.sha256):
        raise UserError(
            f"Tensor {entry.name} in {artifact.folder} is not the one that its manifest lists: the artifact is "
            "damaged. Delete the tensor's file and run the same quantize command again."
        )
    return permuted(tensor, rope_heads(architecture, config, entry.name))


def permuted(tensor: StoredTensor, heads: int | None) -> np.ndarray:
    """The one plane of a GGUF tensor, uint8 [rows, bytes], its rows (of a bias: its elements) in llama.cpp's order."""
    (plane,) = tensor.planes.values()
    rows = plane.reshape(tensor.shape[0], -1)
    return rows if heads is None else rows[rope_order(len(rows), heads)]
