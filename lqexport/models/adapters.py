"""Low-rank corrections of a written model, and the model with the corrections added to its weights.

Corrections are read from an artifact or a native folder, which hold them beside the linears, from a GGUF adapter or
from a PEFT folder.
"""

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
    """The low-rank factors A and B of all corrected linears, by their names in `converters.factors`."""

    def names(self) -> list[str]: ...

    def planes(self, name: str) -> tuple[str, Planes, tuple[int, ...]]:
        """Returns a factor's codec name, planes and shape, with rows in the order of the Hugging Face model."""


class NativeFolderFactors:
    """The low-rank factors of a folder of the native format."""

    def __init__(self, model: NativeModel) -> None:
        self.names, self.planes = model.factors, model.planes


class ArtifactFactors:
    """The low-rank factors of a finished artifact folder."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact

    def names(self) -> list[str]:
        return [name for name in self._artifact.manifest() if is_factor(name)]

    def planes(self, name: str) -> tuple[str, Planes, tuple[int, ...]]:
        tensor = self._artifact.read(name)
        return tensor.codec_name, tensor.planes, tensor.shape


def open_factors(file: Path, adapter: Path | None, config: dict[str, Any]) -> LowRankFactors | None:
    """Returns the low-rank factors of the written model `file`; None if it has none.

    adapter   a GGUF adapter or a PEFT folder to read them from; None: the folder's own, if it is an artifact or a
              native folder
    config    the model's config

    Raises UserError if the adapter does not fit the model, or if one is given for an artifact folder.
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
    """A written model whose weights are base + B A: the same function as the base model run with its adapter."""

    def __init__(self, base: Weights, factors: LowRankFactors) -> None:
        self.config, self._base, self._factors = base.config, base, factors
        self._corrected = set(factors.names())

    def names(self) -> list[str]:
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def read(self, name: str) -> torch.Tensor:
        weight, (name_a, name_b) = self._base.read(name), factor_names(name)
        return weight.float() + self._factor(name_b) @ self._factor(name_a) if name_a in self._corrected else weight

    def _factor(self, name: str) -> torch.Tensor:
        codec_name, planes, shape = self._factors.planes(name)
        return values_of(StoredTensor(name, codec_name, shape, planes))


def corrected(base: Weights, factors: LowRankFactors | None) -> Weights:
    """Returns a written model with its low-rank corrections, if it has any."""
    return CorrectedModel(base, factors) if factors else base


def misfits(base: Weights, factors: LowRankFactors) -> list[str]:
    """Returns a sentence for each correction that lacks a factor or does not fit its weight's shape.

    A factor of a tensor that the model does not have also gives a sentence, up to three of them.
    """
    present, shapes = set(base.names()), {name: factors.planes(name)[2] for name in factors.names()}
    sentences = []
    for name in sorted(present):
        a, b = factor_names(name)
        if (a in shapes) != (b in shapes):
            sentences.append(f"The correction of {name} has one of its two factors alone.")
        elif a in shapes and (shapes[b][0], shapes[a][1], shapes[b][1]) != (*base.shape(name), shapes[a][0]):
            sentences.append(f"The correction {shapes[b]} x {shapes[a]} does not fit {name} {base.shape(name)}.")
    orphans = [name for name in shapes if corrected_linear(name) not in present]
    return sentences + [f"The factor {name} is of no tensor of the model." for name in orphans[:3]]
