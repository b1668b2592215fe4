"""The record that all stages of one run of `quantize` work on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lqexport.calibration.moments import Group
from lqexport.calibration.moments_cache import MomentsCache
from lqexport.calibration.sequences import Calibration
from lqexport.converters.exl2.plan import keeps_order
from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.architectures import architecture_of
from lqexport.converters.plan import PlannedTensor
from lqexport.models.blocks import BlockModel
from lqexport.models.imatrix import SourceImatrix
from lqexport.models.interface import Weights
from lqexport.models.source import Source
from lqexport.recipe import Moments, Recipe
from lqexport.runtime.placement import Placement
from lqexport.runtime.processes import Processes
from lqexport.runtime.progress import Listener
from lqexport.solver.linear import unit_of
from lqexport.storage.artifact import Artifact


@dataclass(frozen=True, eq=False)
class Job:
    """All that a run works on. `prepare` makes it; a stage that changes it returns another one.

    recipe                 the options, with nothing left open
    identity               what two runs must have in common to write the same artifact, as JSON values
    source                 the model to quantize
    planned                the codec of every tensor, in the order of the model
    limit_bytes            the bytes of tensor data that the recipe's size stands for; None without a size
    factors                the plan of the low-rank factors
    calibration            token sequences; None if nothing is solved with calibration passes
    imatrix                the importance matrix; None unless it stands in for the passes
    artifact               the folder that the run writes
    moments_cache          keeps second moments for other stages or runs; None if nothing needs them again
    token_weights_cache    keeps the weights of the tokens of guided moments; None if nothing is solved
    placement              where large tensors are kept
    device                 the device that computes
    processes              all processes of the run
    listener               is told of the progress
    """

    recipe: Recipe
    identity: dict[str, Any]
    source: Source
    planned: list[PlannedTensor]
    limit_bytes: int | None
    factors: list[PlannedTensor]
    calibration: Calibration | None
    imatrix: SourceImatrix | None
    artifact: Artifact
    moments_cache: MomentsCache | None
    token_weights_cache: MomentsCache | None
    placement: Placement
    device: torch.device
    processes: Processes
    listener: Listener

    @cached_property
    def architecture(self) -> Architecture:
        """The architecture of the source."""
        return architecture_of(self.source.config)

    @cached_property
    def linears(self) -> dict[str, PlannedTensor]:
        """The linears of the decoder blocks that the solver works on, by name."""
        return {tensor.name: tensor for tensor in self.planned if tensor.linear and tensor.name not in self._outer}

    @cached_property
    def solved_together(self) -> int:
        """How many columns the solver takes at once in every linear of the decoder blocks."""
        return unit_of(tensor.codec_name for tensor in self.linears.values())

    @property
    def head(self) -> PlannedTensor | None:
        """The output, or the embedding that is also the output, if the solver works on it."""
        return next((tensor for tensor in self.planned if tensor.linear and tensor.name in self._outer), None)

    @property
    def head_is_embedding(self) -> bool:
        """Whether the tensor that the solver works on as the output is the embedding."""
        return self.head is not None and self.head.name == self.architecture.embedding

    @property
    def _outer(self) -> tuple[str, str]:
        return self.architecture.embedding, self.architecture.output

    @property
    def moments_type(self) -> Moments:
        """The type of second moments that the recipe asks for."""
        assert self.recipe.moments is not None
        return self.recipe.moments

    @property
    def work_folder(self) -> Path:
        """The folder for what a stopped run goes on from; it is gone when the run is done."""
        return work_folder(self.artifact)

    @property
    def guided_folder(self) -> Path:
        """The folder from which a stopped guided pass goes on.

        There is one for each folder that keeps second moments: what the pass has yielded before is in that one alone.
        """
        assert self.token_weights_cache is not None
        cache = self.token_weights_cache.folder
        if cache.is_relative_to(self.work_folder):
            return self.work_folder / "guided"
        return self.work_folder / f"guided-{hashlib.sha256(str(cache.resolve()).encode()).hexdigest()[:8]}"

    @property
    def sequences(self) -> Tensor:
        """Token ids int64 [samples, length] that second moments come from."""
        assert self.calibration is not None
        return self.calibration.tokens[: self.recipe.samples]

    def recipe_of(self, name: str) -> Recipe:
        """Returns the recipe for one linear."""
        in_solve_order = self.recipe.parsed_target.stores_columns_in_solve_order
        if in_solve_order and keeps_order(self.architecture, self.source.config, name):
            return replace(self.recipe, act_order=False)
        if name == self.architecture.output and not self.recipe.parsed_target.quantizes_embedding:
            return replace(self.recipe, descent=0)  # it has so many rows and columns that little is left to gain
        return self.recipe

    def model(self) -> BlockModel:
        """Returns the full-precision model, made ready to calibrate with."""
        return self.model_of(self.source)

    def model_of(self, weights: Weights) -> BlockModel:
        """Returns a model of any weights, made ready to calibrate with."""
        dtype = getattr(torch, self.recipe.compute_dtype_on(self.device.type))
        return BlockModel(weights, self.device, compute_dtype=dtype)

    def is_unfinished(self, name: str) -> bool:
        """Returns whether the solver has yet to work on this tensor."""
        # A linear whose shape no grid holds is planned as F16 and is not among the linears.
        return name in self.linears and name not in self.artifact

    def unfinished(self, model: BlockModel, block: int, group: Group) -> list[str]:
        """Names of the linears of a block's group that the solver has yet to work on."""
        return [name for linear in group if self.is_unfinished(name := model.weight_name(block, linear))]


def work_folder(artifact: Artifact) -> Path:
    """Returns the folder of an artifact for what a stopped run goes on from."""
    return artifact.folder / "work"
