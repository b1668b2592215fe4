"""What is in a model: tensors, their types, sizes and effective bits per weight."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from lqexport.converters.exl2.reader import Exl2Model
from lqexport.converters.factors import is_factor
from lqexport.converters.folders.folder_model import method_of
from lqexport.converters.folders.native import METHOD
from lqexport.converters.folders.native_read import NativeModel
from lqexport.converters.gguf.reader import GGUFModel
from lqexport.errors import UserError
from lqexport.formats.codec import nbytes
from lqexport.formats.registry import codec_named
from lqexport.models.source import HuggingFaceSource
from lqexport.sizes import human_bytes
from lqexport.storage.artifact import Artifact


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: its Hugging Face name, shape, the type it is stored in, and the bytes of its data."""

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def kind(self) -> str:
        """What the tensor does, whichever block it is in: `layers.*.mlp.up_proj.weight`."""
        return re.sub(r"\.\d+\.", ".*.", self.name).removeprefix("model.")

    @property
    def sort(self) -> str:
        """The type without what only this tensor has: EXL2's list of groups."""
        return "exl2" if self.type.startswith("exl2:") else self.type


@dataclass(frozen=True)
class Inspection:
    """A model's tensors, and what sort of file or folder it is."""

    path: str
    container: str
    entries: list[TensorInfo]

    def as_json(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        sums = {"weights": weights(self.entries), "nbytes": size(self.entries), "bits_per_weight": bits(self.entries)}
        kinds = [
            {"kind": kind, "type": type_, "count": len(group), "nbytes": size(group), "bits_per_weight": bits(group)}
            for (kind, type_), group in grouped(self.entries).items()
        ]
        return {"path": self.path, "container": self.container, **sums, "kinds": kinds} | {
            "tensors": [asdict(entry) for entry in self.entries]
        }


def weights(entries: Iterable[TensorInfo]) -> int:
    """Weights of the model; factors of corrections add bytes, not weights."""
    return sum(entry.weights for entry in entries if not is_factor(entry.name))


def size(entries: Iterable[TensorInfo]) -> int:
    """Bytes."""
    return sum(entry.nbytes for entry in entries)


def bits(entries: list[TensorInfo]) -> float:
    """Effective bits per weight: 8 times all bytes over all weights; scales, tables and factors included. Of factors
    alone: bits per number."""
    return 8 * size(entries) / max(1, weights(entries) or sum(entry.weights for entry in entries))


def grouped(entries: Iterable[TensorInfo]) -> dict[tuple[str, str], list[TensorInfo]]:
    """Entries by kind and sort of type, in the order in which they first come."""
    groups: dict[tuple[str, str], list[TensorInfo]] = {}
    for entry in entries:
        groups.setdefault((entry.kind, entry.sort), []).append(entry)
    return groups


def table(entries: list[TensorInfo], every: bool = False) -> Table:
    """One line per kind and type, or per tensor, and the sum."""
    groups = [(entry.name, [entry]) for entry in entries] if every else [
        (kind, group) for (kind, _), group in grouped(entries).items()
    ]  # fmt: skip
    result = Table(box=None, pad_edge=False, show_footer=True)
    result.add_column("tensor", "all", overflow="fold")
    result.add_column("count", str(len(entries)), justify="right")
    result.add_column("shape")
    result.add_column("type")
    result.add_column("bits", f"{bits(entries):.3f}", justify="right")
    result.add_column("size", human_bytes(size(entries)), justify="right", no_wrap=True)
    for label, group in groups:
        shapes = " or ".join(dict.fromkeys(" x ".join(map(str, entry.shape)) for entry in group))
        type_ = group[0].type if every else group[0].sort
        row = (label, str(len(group)), shapes, type_, f"{bits(group):.3f}", human_bytes(size(group)))
        result.add_row(*row)
    return result


def inspect(path: Path) -> Inspection:
    """The tensors of a Hugging Face folder, of one that a command of ours wrote, or of a .gguf file.

    Raises UserError for anything else."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{path} is not a .gguf file.")
        return Inspection(str(path), "GGUF file", _model_entries(GGUFModel(path)))
    if not path.is_dir():
        raise UserError(f"There is no file or folder {path}.")
    if (path / "run.json").is_file():
        return Inspection(str(path), "lqexport artifact", _artifact_entries(Artifact(path)))
    method = method_of(path)
    if method == METHOD:
        return Inspection(str(path), "native folder", _model_entries(NativeModel(path)))
    if method == "exl2":
        return Inspection(str(path), Exl2Model.container, _model_entries(Exl2Model(path)))
    source = HuggingFaceSource(path, str(path))
    container = source.layout.container if source.layout else "Hugging Face folder"
    return Inspection(str(path), container, [_source_entry(source, name) for name in source.names()])


def _artifact_entries(artifact: Artifact) -> list[TensorInfo]:
    return [_coded(name, tuple(entry["shape"]), entry["codec"]) for name, entry in artifact.manifest().items()]


def _model_entries(model: GGUFModel | Exl2Model | NativeModel) -> list[TensorInfo]:
    names = [*model.names(), *(model.factors() if isinstance(model, NativeModel) else [])]
    return [_coded(name, model.shape(name), model.codec_name(name)) for name in names]


def _coded(name: str, shape: tuple[int, ...], codec_name: str) -> TensorInfo:
    rows, columns = shape if len(shape) == 2 else (1, shape[0])
    return TensorInfo(name, shape, codec_name, nbytes(codec_named(codec_name), rows, columns))


def _source_entry(source: HuggingFaceSource, name: str) -> TensorInfo:
    """From the headers of the safetensors files; of a quantized weight also the groups of its columns are read."""
    return TensorInfo(name, source.shape(name), source.dtype(name), source.nbytes(name))
