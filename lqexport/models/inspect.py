"""Lists a model's tensors with their types, sizes and effective bits per weight.

What needs torch, which takes seconds to import, is imported where a folder needs it: a .gguf file and an artifact do
not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lqexport.converters.counting import Count, copied_output, counted, counted_linears
from lqexport.converters.exl2.reader import Exl2Model
from lqexport.converters.folders.folder_model import FolderModel, method_of
from lqexport.converters.folders.native import METHOD
from lqexport.converters.gguf.header import IMAGE_PART
from lqexport.converters.gguf.reader import GGUFModel
from lqexport.converters.gguf.split import is_gguf, read_split
from lqexport.converters.mlx.types import quantization_of
from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.architectures import architecture_of
from lqexport.converters.plan import rows_and_columns
from lqexport.errors import UserError, files_at_hand
from lqexport.formats.codec import nbytes
from lqexport.formats.registry import codec_named
from lqexport.models.model_path import check_exists
from lqexport.runtime.shown import Shown
from lqexport.sizes import human_bytes
from lqexport.storage.artifact import Artifact

if TYPE_CHECKING:
    from lqexport.converters.folders.native_read import NativeModel
    from lqexport.models.source import HuggingFaceSource


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a model.

    name     its Hugging Face name
    shape    [rows, columns] or [n], for a source also of more dimensions
    type     how it is stored: a codec name, or a source's dtype
    nbytes   the bytes of its data
    """

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int

    @property
    def weights(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def role(self) -> str:
        """The name without the numbers of block and expert: `layers.*.mlp.up_proj.weight`."""
        return re.sub(r"\.\d+\.", ".*.", self.name).removeprefix("model.")

    @property
    def short_type(self) -> str:
        """The type without the details that differ from tensor to tensor: EXL2's list of groups."""
        return "exl2" if self.type.startswith("exl2:") else self.type


@dataclass(frozen=True, repr=False)
class Inspection(Shown):
    """A model's tensors.

    path           the file or folder
    container      what it is, such as `GGUF file`
    entries        the tensors, in the order of the model
    architecture   the model's architecture; None of an image part
    copied         the name of an output that is a copy of the embedding, which adds no weights; None if there is none
    """

    path: str
    container: str
    entries: list[TensorInfo]
    architecture: Architecture | None = None
    copied: str | None = None

    @classmethod
    def of_model(cls, path: Path, container: str, entries: list[TensorInfo], config: dict[str, Any]) -> Inspection:
        """Returns the inspection of a model with this config.json."""
        return cls(str(path), container, entries, architecture_of(config), copied_output(config))

    @property
    def linears(self) -> Count | None:
        """The count of the decoder blocks' linears; None without any."""
        count = counted_linears(self.entries, self.architecture) if self.architecture else None
        return count if count and count.weights else None

    def as_json(self) -> dict[str, Any]:
        """Returns everything as JSON values, for `--json`."""
        count, linears = counted(self.entries, self.copied), self.linears
        sums = {
            "weights": count.weights,
            "nbytes": count.nbytes,
            "bits_per_weight": count.bits_per_weight,
            "linears_bits_per_weight": linears.bits_per_weight if linears else None,
        }
        roles = [
            {"kind": role, "type": type_, "count": len(group), "nbytes": size(group), "bits_per_weight": bits(group)}
            for (role, type_), group in grouped(self.entries).items()
        ]
        return {"path": self.path, "container": self.container, **sums, "kinds": roles} | {
            "tensors": [asdict(entry) for entry in self.entries]
        }


def size(entries: Iterable[TensorInfo]) -> int:
    """Returns the bytes of all tensors together."""
    return sum(entry.nbytes for entry in entries)


def bits(entries: list[TensorInfo]) -> float:
    """Returns the effective bits per weight of some tensors: 8 times all their bytes, divided by their numbers."""
    return 8 * size(entries) / max(1, sum(entry.weights for entry in entries))


def grouped(entries: Iterable[TensorInfo]) -> dict[tuple[str, str], list[TensorInfo]]:
    """Returns the entries grouped by role and short type, in the order of each group's first entry."""
    groups: dict[tuple[str, str], list[TensorInfo]] = {}
    for entry in entries:
        groups.setdefault((entry.role, entry.short_type), []).append(entry)
    return groups


def table(entries: list[TensorInfo], copied: str | None, every: bool = False) -> Table:
    """Returns a table with one line per role and type, or per tensor (`every`), and a line with the sums.

    copied   as for `counted`, which counts the weights of the last line
    """
    groups = [(entry.name, [entry]) for entry in entries] if every else [
        (role, group) for (role, _), group in grouped(entries).items()
    ]  # fmt: skip
    result = Table(box=None, pad_edge=False, show_footer=True)
    result.add_column("tensor", "all", overflow="fold")
    result.add_column("count", str(len(entries)), justify="right")
    result.add_column("shape")
    result.add_column("type")
    result.add_column("bits", f"{counted(entries, copied).bits_per_weight:.3f}", justify="right")
    result.add_column("size", human_bytes(size(entries)), justify="right", no_wrap=True)
    for label, group in groups:
        shapes = " or ".join(dict.fromkeys(" x ".join(map(str, entry.shape)) for entry in group))
        type_ = group[0].type if every else group[0].short_type
        row = (label, str(len(group)), shapes, type_, f"{bits(group):.3f}", human_bytes(size(group)))
        result.add_row(*row)
    return result


def listing(inspection: Inspection, every: bool = False) -> RenderableType:
    """Returns what `lqexport inspect` prints: what the model is, its `table`, and the bits of its linears."""
    first, linears = Text(f"{inspection.path}: {inspection.container}"), inspection.linears
    last = [Text(f"Linears of the blocks: {linears.bits_per_weight:.3f} bits per weight")] if linears else []
    return Group(first, table(inspection.entries, inspection.copied, every), *last)


@files_at_hand()
def inspect(path: str | Path) -> Inspection:
    """Returns the tensors of a .gguf file, of a Hugging Face folder, or of a folder that an lqexport command wrote.

    Raises UserError for anything else.
    """
    path = Path(path)
    if path.is_file():
        if not is_gguf(path):
            raise UserError(f"{path} is not a .gguf file.")
        return _gguf_inspection(path)
    check_exists(path)
    if (path / "run.json").is_file():
        artifact = Artifact(path)
        return Inspection.of_model(path, "lqexport artifact", _artifact_entries(artifact), artifact.config())
    if quantization_of(path) is not None:
        mlx = _mlx_model(path)
        return Inspection.of_model(path, "MLX folder", _entries(mlx, mlx.names()), mlx.config)
    method = method_of(path)
    if method == METHOD:
        native = _native_model(path)
        entries = _entries(native, [*native.names(), *native.factors()])
        return Inspection.of_model(path, "native folder", entries, native.config)
    if method in ("exl2", "exl3"):
        folder = Exl2Model(path) if method == "exl2" else _exl3_model(path)
        return Inspection.of_model(path, folder.container, _entries(folder, folder.names()), folder.config)
    from lqexport.models.source import HuggingFaceSource

    source = HuggingFaceSource(path, str(path))
    container = source.layout.container if source.layout else "Hugging Face folder"
    entries = [_source_entry(source, name) for name in source.names()]
    return Inspection.of_model(path, container, entries, source.config)


def _gguf_inspection(path: Path) -> Inspection:
    """Returns the tensors of a GGUF file; those of an image part by their GGUF names."""
    try:
        file = GGUFModel(path)
        return Inspection(str(path), "GGUF file", _entries(file, file.names()), file.architecture)
    except UserError:
        metadata, tensors, _ = read_split(path)
        if metadata.get("general.architecture") != IMAGE_PART:
            raise
    entries = [TensorInfo(name, each.shape, f"gguf:{each.tensor_type}", each.nbytes) for name, each in tensors.items()]
    return Inspection(str(path), "GGUF file of an image part", entries)


def _artifact_entries(artifact: Artifact) -> list[TensorInfo]:
    return [_coded(name, tuple(entry["shape"]), entry["codec"]) for name, entry in artifact.manifest().items()]


def _native_model(folder: Path) -> NativeModel:
    from lqexport.converters.folders.native_read import NativeModel

    return NativeModel(folder)


def _mlx_model(folder: Path) -> FolderModel:
    from lqexport.converters.mlx.reader import MlxModel

    return MlxModel(folder)


def _exl3_model(folder: Path) -> FolderModel:
    from lqexport.converters.exl3.reader import Exl3Model
    from lqexport.models.modules import expected_shapes

    return Exl3Model(folder, expected_shapes)


def _entries(model: GGUFModel | FolderModel | NativeModel, names: list[str]) -> list[TensorInfo]:
    return [_coded(name, model.shape(name), model.codec_name(name)) for name in names]


def _coded(name: str, shape: tuple[int, ...], codec_name: str) -> TensorInfo:
    return TensorInfo(name, shape, codec_name, nbytes(codec_named(codec_name), *rows_and_columns(shape)))


def _source_entry(source: HuggingFaceSource, name: str) -> TensorInfo:
    """Returns the entry of a tensor from the headers of the safetensors files.

    For a quantized weight, the groups of its columns are read as well.
    """
    return TensorInfo(name, source.shape(name), source.dtype(name), source.nbytes(name))
