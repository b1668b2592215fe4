"""Writing an artifact as a folder of packed linears: shards, config.json and the tokenizer. Only bytes move.

The folder appears under its name whole or not at all. Tensors are read, checked against the manifest's digests and
written one after the other, so memory holds one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lqexport.converters.factors import is_factor
from lqexport.converters.folders.shards import Part, new_folder, write_shards
from lqexport.converters.plan import PLAIN
from lqexport.errors import UserError
from lqexport.formats.codec import Planes
from lqexport.storage.artifact import Artifact, StoredTensor
from lqexport.storage.files import copy_files, write_json

Forms = dict[str, tuple[np.dtype, tuple[int, ...]]]
"""dtype and shape of what is stored of a tensor."""
Rows = tuple[int, int]
OnTensor = Callable[[str, int], None] | None


@dataclass(frozen=True)
class FolderLayout:
    """How a target's folder stores what the solver worked on; all else is one float16 tensor of its own name.

    forms    codec name and shape to what is stored, by the last part of its name
    planes   a tensor to that
    pieces   name and number of rows to the names that a tensor is stored under, and the rows (the first, and the one
             behind the last) that each of them holds
    cut      planes to those of some of the rows
    """

    forms: Callable[[str, tuple[int, ...]], Forms]
    planes: Callable[[StoredTensor], Planes]
    pieces: Callable[[str, int], dict[str, Rows]] = lambda name, rows: {name: (0, rows)}
    cut: Callable[[Planes, Rows], Planes] = lambda planes, rows: planes


@dataclass(frozen=True)
class FolderEntry:
    """A tensor of the model, as the manifest lists it."""

    name: str
    codec_name: str
    shape: tuple[int, ...]
    sha256: str

    def part(self, layout: FolderLayout) -> Part:
        """What the folder stores of it."""
        pieces = layout.pieces(self.name, self.shape[0])
        if self.codec_name == PLAIN:
            return Part(self.name, dict.fromkeys(pieces, (np.dtype(np.float16), self.shape)))
        forms = {
            name: layout.forms(self.codec_name, (end - begin, self.shape[1])) for name, (begin, end) in pieces.items()
        }
        named = {name.removesuffix(".weight"): of_piece for name, of_piece in forms.items()}
        return Part(self.name, {f"{key}.{plane}": form for key, of in named.items() for plane, form in of.items()})


def entries_of(artifact: Artifact, family: str, what: str, hint: str) -> list[FolderEntry]:
    """The tensors of a finished artifact, factors of corrections left out. Raises UserError where it was not quantized
    into codecs of `family`, saying that it cannot become `what`, with a `hint` at what to do."""
    entries = [
        FolderEntry(name, facts["codec"], tuple(facts["shape"]), facts["sha256"])
        for name, facts in artifact.manifest().items()
        if not is_factor(name)
    ]
    foreign = [
        entry for entry in entries if entry.codec_name != PLAIN and not entry.codec_name.startswith(f"{family}:")
    ]
    if foreign or all(entry.codec_name == PLAIN for entry in entries):
        (usual, _), *_ = Counter(entry.codec_name for entry in foreign or entries).most_common(1)
        raise UserError(
            f"{artifact.folder} cannot become {what} by moving bytes: it was quantized for another format, most of it "
            f"{usual}. {hint}"
        )
    return entries


def write_folder(
    artifact: Artifact,
    folder: Path,
    entries: list[FolderEntry],
    layout: FolderLayout,
    files: dict[str, Any],
    on_tensor: OnTensor,
) -> None:
    """Write the new folder `folder`; `files` are its JSON files, config.json among them. Equal artifacts give equal
    bytes.

    on_tensor   called with name and bytes after each tensor

    Raises UserError where the artifact is damaged, where the folder exists, and where the disk is too small.
    """
    named, parts = {entry.name: entry for entry in entries}, [entry.part(layout) for entry in entries]

    def read(part: Part) -> list[np.ndarray]:
        return _planes(artifact, named[part.name], layout)

    with new_folder(folder, sum(part.nbytes for part in parts)) as partial:
        copy_files(artifact.model_folder, artifact.model_files(), partial)
        for name, content in files.items():
            write_json(partial / name, content)
        write_shards(partial, parts, read, on_tensor)


def _planes(artifact: Artifact, entry: FolderEntry, layout: FolderLayout) -> list[np.ndarray]:
    """What the folder stores of a tensor, in the order of its `part`, after its digest was checked."""
    tensor = artifact.read_listed(entry.name, entry.codec_name, entry.shape, entry.sha256)
    if entry.codec_name == PLAIN:
        return [tensor.planes["blocks"].view(np.float16).reshape(entry.shape)]
    planes = layout.planes(tensor)
    cuts = [layout.cut(planes, rows) for rows in layout.pieces(entry.name, entry.shape[0]).values()]
    return [cut[plane] for cut in cuts for plane in layout.forms(entry.codec_name, entry.shape)]
