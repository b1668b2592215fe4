"""Writes an artifact as a folder of packed linears: shards, config.json and the tokenizer. No value changes.

The folder appears under its name whole or not at all. Tensors are read, checked against the manifest's digests and
written one by one, so memory holds one tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lqexport.converters.factors import is_factor
from lqexport.converters.folders.shards import FolderTensor, new_folder, write_shards
from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.architectures import architecture_of
from lqexport.converters.models.tensor_names import checkpoint_shape
from lqexport.converters.plan import PLAIN
from lqexport.errors import UserError
from lqexport.formats.codec import Planes
from lqexport.storage.artifact import Artifact, StoredTensor
from lqexport.storage.files import copy_files, write_json

Forms = dict[str, tuple[np.dtype, tuple[int, ...]]]
"""The stored tensors of a packed linear: last part of the name -> dtype and shape."""
Rows = tuple[int, int]
"""A run of rows: the first row, and the row behind the last."""
OnTensor = Callable[[str, int], None] | None


@dataclass(frozen=True)
class FolderLayout:
    """The functions by which a target's folder stores packed linears; other tensors keep their own names.

    forms    codec name and shape -> the stored tensors (`Forms`)
    planes   a tensor of the artifact -> the arrays of its stored tensors
    pieces   name and number of rows -> the names under which a tensor is stored, each with the rows that it holds
    cut      arrays of a tensor and a run of rows -> the arrays of those rows
    plain    codec of a tensor that is not packed -> the dtype of its array
    stored_shape   name and shape of a tensor that is not packed -> the shape in which it is stored, filled with zeros
    """

    forms: Callable[[str, tuple[int, ...]], Forms]
    planes: Callable[[StoredTensor], Planes]
    pieces: Callable[[str, int], dict[str, Rows]] = lambda name, rows: {name: (0, rows)}
    cut: Callable[[Planes, Rows], Planes] = lambda planes, rows: planes
    plain: Mapping[str, np.dtype] = field(default_factory=lambda: {PLAIN: np.dtype(np.float16)})
    stored_shape: Callable[[str, tuple[int, ...]], tuple[int, ...]] = lambda name, shape: shape


@dataclass(frozen=True)
class FolderEntry:
    """One tensor of the model, as the manifest lists it."""

    name: str
    codec_name: str
    shape: tuple[int, ...]
    sha256: str

    def folder_tensor(self, layout: FolderLayout, architecture: Architecture) -> FolderTensor:
        """Returns the names, dtypes and shapes of the tensors that the folder stores for it."""
        pieces = layout.pieces(self.name, self.shape[0])
        if self.codec_name in layout.plain:
            shape = layout.stored_shape(self.name, checkpoint_shape(architecture, self.name, self.shape))
            return FolderTensor(self.name, dict.fromkeys(pieces, (layout.plain[self.codec_name], shape)))
        forms = {
            name: layout.forms(self.codec_name, (end - begin, self.shape[1])) for name, (begin, end) in pieces.items()
        }
        named = {name.removesuffix(".weight"): of_piece for name, of_piece in forms.items()}
        return FolderTensor(
            self.name, {f"{key}.{plane}": form for key, of_piece in named.items() for plane, form in of_piece.items()}
        )


def entries_of(
    artifact: Artifact, family: str, container: str, hint: str, plain: tuple[str, ...] = (PLAIN,)
) -> list[FolderEntry]:
    """Returns the tensors of a finished artifact without the low-rank factors.

    family      the format family of the codecs that the folder can hold
    container   the folder's name in the message, such as `an EXL2 folder`
    hint        advice at the end of the message
    plain       the codecs of tensors that are not packed

    Raises UserError if the artifact was not quantized into codecs of the family.
    """
    entries = [
        FolderEntry(name, facts["codec"], tuple(facts["shape"]), facts["sha256"])
        for name, facts in artifact.manifest().items()
        if not is_factor(name)
    ]
    foreign = [
        entry for entry in entries if entry.codec_name not in plain and not entry.codec_name.startswith(f"{family}:")
    ]
    if foreign or all(entry.codec_name in plain for entry in entries):
        (usual, _), *_ = Counter(entry.codec_name for entry in foreign or entries).most_common(1)
        raise UserError(
            f"{artifact.folder} cannot become {container} by moving bytes: it was quantized for another format, most "
            f"of it {usual}. {hint}"
        )
    return entries


def check_source_files(engine: str, source: Path, config: dict[str, Any]) -> None:
    """Raises UserError if the source lacks what ExLlamaV2 and ExLlamaV3 read beside the tensors.

    engine   the engine's name in the message
    source   the folder of the source's files
    config   the source's config.json
    """
    if len(config.get("architectures") or []) != 1:
        raise UserError(
            f"{engine} needs a config.json that names exactly one architecture, and that of {source} does not. State "
            "the model's class in its `architectures`."
        )
    if not (source / "tokenizer.json").is_file():
        raise UserError(
            f"{engine} needs a tokenizer.json, and {source} has none. Save the tokenizer there with transformers, "
            "which writes one."
        )


def write_folder(
    artifact: Artifact,
    folder: Path,
    entries: list[FolderEntry],
    layout: FolderLayout,
    files: dict[str, Any],
    on_tensor: OnTensor,
) -> None:
    """Writes the new folder `folder`. Equal artifacts give equal bytes.

    files       file name -> content of the folder's JSON files, config.json among them
    on_tensor   called with name and bytes after each tensor

    Raises UserError if the artifact is damaged, if the folder exists, or if the disk is too small.
    """
    named, architecture = {entry.name: entry for entry in entries}, architecture_of(artifact.config())
    tensors = [entry.folder_tensor(layout, architecture) for entry in entries]

    def read(tensor: FolderTensor) -> list[np.ndarray]:
        return _arrays(artifact, named[tensor.name], layout)

    with new_folder(folder, sum(tensor.nbytes for tensor in tensors)) as partial:
        copy_files(artifact.model_folder, artifact.model_files(), partial)
        for name, content in files.items():
            write_json(partial / name, content)
        write_shards(partial, tensors, read, on_tensor)


def _arrays(artifact: Artifact, entry: FolderEntry, layout: FolderLayout) -> list[np.ndarray]:
    """Returns the arrays that the folder stores for a tensor, in the order of `folder_tensor`. Checks its digest."""
    tensor = artifact.read_listed(entry.name, entry.codec_name, entry.shape, entry.sha256)
    if entry.codec_name in layout.plain:
        values = tensor.planes["blocks"].view(layout.plain[entry.codec_name]).reshape(entry.shape)
        stored = layout.stored_shape(entry.name, entry.shape)
        return [np.pad(values, [(0, end - size) for size, end in zip(values.shape, stored, strict=True)])]
    planes = layout.planes(tensor)
    cuts = [layout.cut(planes, rows) for rows in layout.pieces(entry.name, entry.shape[0]).values()]
    return [cut[plane] for cut in cuts for plane in layout.forms(entry.codec_name, entry.shape)]
