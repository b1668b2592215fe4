"""Low-rank corrections as written (beside an artifact's linears, in a GGUF adapter, in a PEFT folder), and a model with
them added."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from lqexport.converters.factors import corrected_linear, factor_names, is_factor
from lqexport.converters.folders.native import is_native_folder
from lqexport.converters.folders.native_read import NativeModel
from lqexport.converters.folders.peft import PeftAdapter
from lqexport.converters.gguf.adapter import GGUFAdapter
from lqexport.errors import UserError
from lqexport.formats.codec import Planes
from lqexport.models.interface import Weights
from lqexport.storage.artifact import Artifact, StoredTensor, values_of


class LowRankFactors(Protocol):
    """Factors of corrections, by their names in `converters.factors`."""

    def names(self) -> list[str]: ...

    def planes(self, name: str) -> tuple[str, Planes, tuple[int, ...]]:
        """A factor's codec, planes and shape, rows in the order of the Hugging Face model."""


class NativeFolderFactors:
    """Those of a folder of the native format."""

    def __init__(self, model: NativeModel) -> None:
        self.names, self.planes = model.factors, model.planes


class ArtifactFactors:
    """Those of a finished artifact folder."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact

    def names(self) -> list[str]:
        return [name for name in self._artifact.manifest() if is_factor(name)]

    def planes(self, name: str) -> tuple[str, Planes, tuple[int, ...]]:
        tensor = self._artifact.read(name)
        return tensor.codec_name, tensor.planes, tensor.shape


def open_factors(file: Path, adapter: Path | None, config: dict[str, Any]) -> LowRankFactors | None:
    """The corrections of a written model: the file `adapter`, or those that a folder of ours holds; None for none.

    config   of the model. Raises UserError where the adapter is not one for it, and for one beside an artifact folder.
    """
    artifact = (file / "manifest.json").is_file()
    if adapter is not None and artifact:
        raise UserError(f"{file} is an artifact folder, which holds its own factors: leave out the adapter.")
    if adapter is not None:
        return PeftAdapter(adapter) if adapter.is_dir() else GGUFAdapter(adapter, config)
    factors: LowRankFactors | None = None
    if artifact:
        factors = ArtifactFactors(Artifact(file))
    elif is_native_folder(file):
        factors = NativeFolderFactors(NativeModel(file))
    return factors if factors and factors.names() else None


class CorrectedModel:
    """A written model with its corrections added to the weights: the same function as the base beside its adapter."""

    def __init__(self, base: Weights, factors: LowRankFactors) -> None:
        self.config, self._base, self._factors = base.config, base, factors
        self._corrected = set(factors.names())

    def names(self) -> list[str]:
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def read(self, name: str) -> torch.Tensor:
        weight, (down, up) = self._base.read(name), factor_names(name)
        return weight.float() + self._factor(up) @ self._factor(down) if down in self._corrected else weight

    def _factor(self, name: str) -> torch.Tensor:
        kind, planes, shape = self._factors.planes(name)
        return values_of(StoredTensor(name, kind, shape, planes))


def misfits(base: Weights, factors: LowRankFactors) -> list[str]:
    """A sentence for each correction that lacks a factor, or whose shape is not that of a weight of the model."""
    present, shapes = set(base.names()), {name: factors.planes(name)[2] for name in factors.names()}
    sentences = []
    for name in sorted(present):
        down, up = factor_names(name)
        if (down in shapes) != (up in shapes):
            sentences.append(f"The correction of {name} has one of its two factors alone.")
        elif down in shapes and (shapes[up][0], shapes[down][1], shapes[up][1]) != (*base.shape(name), shapes[down][0]):
            sentences.append(f"The correction {shapes[up]} x {shapes[down]} does not fit {name} {base.shape(name)}.")
    orphans = [name for name in shapes if corrected_linear(name) not in present]
    return sentences + [f"The factor {name} is of no tensor of the model." for name in orphans[:3]]
