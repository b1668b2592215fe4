"""Opens written models: .gguf files, folders and finished artifacts, all as `lqexport.models.interface.Weights`."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from lqexport.converters.exl3.reader import Exl3Model
from lqexport.converters.factors import is_factor
from lqexport.converters.folder_formats import MODELS
from lqexport.converters.folders.folder_model import FolderModel, method_of
from lqexport.converters.folders.native import METHOD
from lqexport.converters.folders.native_read import NativeModel
from lqexport.converters.gguf.split import is_gguf
from lqexport.converters.mlx.reader import MlxModel
from lqexport.converters.mlx.types import quantization_of
from lqexport.errors import UserError
from lqexport.formats.codec import Planes
from lqexport.models.interface import Weights
from lqexport.models.modules import expected_shapes
from lqexport.models.source import GGUFSource
from lqexport.storage.artifact import Artifact, StoredTensor, decoded


class Packed(Protocol):
    """A set of written tensors whose packed planes can be read."""

    def planes(self, name: str) -> tuple[str, Planes, tuple[int, ...]]:
        """Returns one tensor's codec name, planes and shape, with rows in the order of the Hugging Face model."""


class Export(Weights, Packed, Protocol):
    """A written model, whose tensors can be read decoded or packed."""


class ArtifactModel:
    """A finished artifact folder as a model."""

    def __init__(self, folder: Path) -> None:
        self._artifact = Artifact(folder)
        self._manifest = self._artifact.manifest()
        self.config = self._artifact.config()

    def names(self) -> list[str]:
        return [name for name in self._manifest if not is_factor(name)]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._manifest[name]["shape"])

    def planes(self, name: str) -> tuple[str, Planes, tuple[int, ...]]:
        tensor = self._artifact.read(name)
        return tensor.codec_name, tensor.planes, tensor.shape

    def read(self, name: str) -> torch.Tensor:
        return torch.from_numpy(decoded(stored(self, name)))


def stored(export: Packed, name: str) -> StoredTensor:
    """Returns one tensor of a written model in its packed form."""
    codec_name, planes, shape = export.planes(name)
    return StoredTensor(name, codec_name, shape, planes)


class NativeFolder(NativeModel):
    """A folder of the native format as a model."""

    def read(self, name: str) -> torch.Tensor:  # type: ignore[override]
        return torch.from_numpy(super().read(name))


class PackedFolder:
    """A folder of packed safetensors (`converters.folder_formats`) as a model."""

    def __init__(self, model: FolderModel) -> None:
        self._model = model
        self.config = model.config

    def names(self) -> list[str]:
        return self._model.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._model.shape(name)

    def planes(self, name: str) -> tuple[str, Planes, tuple[int, ...]]:
        return self._model.planes(name)

    def read(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self._model.read(name))


def is_written(path: Path) -> bool:
    """Returns whether a path is a .gguf file, an artifact, or a folder in a form that lqexport writes.

    Those are for `open_export`; any other folder can be a source alone. Raises UserError if its config.json is damaged.
    """
    if is_gguf(path) or any((path / name).is_file() for name in ("manifest.json", "run.json")):
        return True
    return quantization_of(path) is not None or method_of(path) in (*MODELS, "exl3", METHOD)


def open_export(path: Path) -> Export:
    """Opens a .gguf file, a folder that an lqexport command wrote, or a finished artifact.

    Raises UserError for anything else.
    """
    if quantization_of(path) is not None:
        return PackedFolder(MlxModel(path))
    method = method_of(path)
    if method == "exl3":
        return PackedFolder(Exl3Model(path, expected_shapes))
    if method in MODELS:
        return PackedFolder(MODELS[method](path))
    if method == METHOD:
        return NativeFolder(path)
    if method:
        raise UserError(
            f"{path} is quantized by {method}: `lqexport quantize` moves such a model to a format that is read here."
        )
    if path.is_dir():
        return ArtifactModel(path)
    if not is_gguf(path) or not path.is_file():
        raise UserError(f"{path} is neither a .gguf file nor a folder that lqexport wrote.")
    return GGUFSource(path)
