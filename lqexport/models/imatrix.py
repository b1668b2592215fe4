"""Reads the importance matrix of a recipe, and looks up a source's linears in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lqexport.converters.gguf.imatrix import ImportanceMatrix, read_imatrix
from lqexport.converters.models.architectures import architecture_of
from lqexport.converters.models.tensor_names import expert_number, gguf_names, group_count
from lqexport.converters.plan import PlannedTensor
from lqexport.errors import UserError, listed
from lqexport.models.source import Source
from lqexport.recipe import Recipe
from lqexport.storage.files import file_digest


def imatrix_of(source: Source, recipe: Recipe) -> SourceImatrix | None:
    """Returns the importance matrix that a recipe names, or None. Raises UserError if it cannot be read."""
    if recipe.imatrix is None:
        return None
    path, architecture = Path(recipe.imatrix), architecture_of(source.config)
    names = gguf_names(architecture, int(source.config["num_hidden_layers"]))
    groups = {name: group_count(architecture, source.config, name) for name in names}
    return SourceImatrix(read_imatrix(path), names, groups, path, file_digest(path))


@dataclass(frozen=True)
class SourceImatrix:
    """An importance matrix of a source's linears.

    matrix   what the file has, by GGUF names
    names    Hugging Face name -> GGUF name of every tensor
    groups   Hugging Face name -> the number of matrices that the tensor is in GGUF (`group_count`)
    path, sha256   of the file
    """

    matrix: ImportanceMatrix
    names: dict[str, str]
    groups: dict[str, int]
    path: Path
    sha256: str

    def facts(self) -> dict[str, Any]:
        """Returns what run.json says of it, as JSON values: its digest, and its texts without their folders."""
        datasets = [Path(name).name for name in self.matrix.datasets]
        return {"imatrix": {"sha256": self.sha256, "datasets": datasets}}

    def means(self, name: str, columns: int) -> Tensor:
        """Returns the mean squares of a linear's inputs, float32 [columns]; ones if the matrix has none of it.

        Raises UserError if they are of other inputs.
        """
        gguf_name = self.names[name]
        try:
            means = self.matrix.mean(gguf_name, expert_number(name), columns, self.groups[name])
        except ValueError as error:
            raise UserError(f"{self.path} is of another model: {error}.") from error
        return torch.ones(columns) if means is None else torch.from_numpy(means.copy())

    def missing(self, planned: list[PlannedTensor]) -> list[str]:
        """Returns a warning if linears are not in the matrix. Raises UserError if it is of another model."""
        linears = [tensor for tensor in planned if tensor.linear]
        for tensor in linears:
            self.means(tensor.name, tensor.matrix[1])
        without = [tensor.name for tensor in linears if self.names[tensor.name] not in self.matrix.means]
        if linears and len(without) == len(linears):
            raise UserError(f"{self.path} is of another model: it has none of its {len(linears)} linears.")
        if not without:
            return []
        return [f"The importance matrix lacks {listed(without, 3)}: all of their columns weigh the same."]
