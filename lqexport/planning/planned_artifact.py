"""The artifact of a run before there is one, from which the content of its GGUF file follows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lqexport.converters.plan import PlannedTensor
from lqexport.models.source import Source
from lqexport.recipe import Recipe
from lqexport.solver.rounded_tensor import round_tensor
from lqexport.storage.artifact import StoredTensor
from lqexport.storage.config_check import read_config


@dataclass(frozen=True)
class PlannedArtifact:
    """The artifact that a run will write, as a `StoredModel`.

    planned   the tensors that the run will store, without low-rank factors
    folder    a folder in which `copy_model_files` of the source has written its `model_folder`
    """

    source: Source
    recipe: Recipe
    planned: list[PlannedTensor]
    folder: Path

    @property
    def model_folder(self) -> Path:
        return self.folder / "model"

    def run(self) -> dict[str, Any]:
        return {"recipe": {"source": self.recipe.source, "target": str(self.recipe.parsed_target)}}

    def config(self) -> dict[str, Any]:
        path = self.model_folder / "config.json"
        return read_config(path, f"{path} is gone.")

    def manifest(self) -> dict[str, dict[str, Any]]:
        return {
            tensor.name: {"codec": tensor.codec_name, "shape": list(tensor.shape), "sha256": ""}
            for tensor in self.planned
        }

    def read_listed(self, name: str, codec: str, shape: tuple[int, ...], sha256: str) -> StoredTensor:
        """Returns a tensor of the source in the codec that will store it."""
        return round_tensor(name, self.source.read(name), codec)
