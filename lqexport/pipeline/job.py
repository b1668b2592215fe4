"""What all stages of one call of `quantize` work on: the source, the plan, the calibration, the artifact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lqexport.calibration.block_collector import BlockMoments
from lqexport.calibration.collect import by_weight, forward_moments, input_magnitudes
from lqexport.calibration.guided import guided_moments, guided_pass
from lqexport.calibration.moments import Group, TokenWeights
from lqexport.calibration.moments_cache import MomentsCache
from lqexport.calibration.sequences import Calibration, load_calibration
from lqexport.converters.exl2.plan import keeps_order
from lqexport.converters.models.architectures import architecture_of
from lqexport.converters.plan import PlannedTensor
from lqexport.errors import UserError
from lqexport.formats.codec import PlainCodec
from lqexport.formats.registry import codec_named
from lqexport.models.blocks import BlockModel
from lqexport.models.interface import Weights
from lqexport.models.smoothing import SEQUENCES, Smoothed, column_scales, pairs
from lqexport.models.source import Source, open_source
from lqexport.models.source_grids import KEPT
from lqexport.pipeline.measured_losses import Measured
from lqexport.planning.cost import Work
from lqexport.planning.defaults import settled
from lqexport.planning.memory import MemoryLimits, choose_placement, placements, told
from lqexport.planning.recipe_plan import plan_factors, plan_recipe
from lqexport.recipe import Recipe
from lqexport.runtime.environment import versions
from lqexport.runtime.placement import Placement
from lqexport.runtime.processes import ALONE, Processes
from lqexport.runtime.progress import Listener
from lqexport.storage.artifact import Artifact
from lqexport.tuning.tune import HELD_OUT

MEASURED_BY = ("method", "moments", "dampening", "importance", "exponent", "act_order")
"""Options that decide the predicted loss of a type or mix, besides those that decide the second moments."""


class Job:
    """Opened and checked, and the artifact begun. Raises UserError for bad input.

    recipe    with nothing left open;  kind   of its second moments
    planned   what every tensor will be stored as
    linears   those of the decoder blocks that the solver works on, by name;  head   the output, where it works on that
    factors   of the linears' low-rank corrections
    work      a folder of the artifact for what a stopped run goes on from
    room      where things are kept, within `limits`
    """

    def __init__(
        self, recipe: Recipe, out: Path, device: torch.device, cache: Path | None, listener: Listener,
        processes: Processes = ALONE, limits: MemoryLimits | None = None,
    ) -> None:  # fmt: skip
        self.device, self.listener, self.processes = device, listener, processes
        self.source: Source = open_source(recipe.source)
        self.recipe = recipe = settled(recipe, self.source.config)
        assert recipe.moments is not None
        self.kind = recipe.moments
        self.architecture = architecture_of(self.source.config)
        self.take_plan(plan_recipe(self.source, recipe))
        self.factors = plan_factors(self.source, self.planned, recipe)
        self._check_output_groups()
        self._check_experts()
        if self.architecture.encoder and recipe.size is not None:
            raise UserError("Types are chosen by size for models that predict tokens: give an encoder's target a type.")
        self.calibration = self._calibration()
        self.artifact = Artifact(out)
        self._begin()
        self.work = out / "work"
        # Choosing types needs all moments before solving does, so they are kept.
        cache = cache or (self.work / "moments" if recipe.chooses else None)
        self._cache = MomentsCache(cache, self._moments_facts()) if cache and self.calibration else None
        self._weights = (cache or self.work) / "weights"
        self.placement = self._room(limits or MemoryLimits())
        if self._cache and processes.first:
            self._cache.write_facts()
        if recipe.smooth and self.calibration and not processes.agreed(self.artifact.complete):
            self._smooth()

    def _room(self, limits: MemoryLimits) -> Placement:
        """Where things are kept; said where that is not simply the device."""
        work = Work(self.recipe, self.source.config, self.planned)
        placement = choose_placement(work, self.device, self.work, limits)
        # What is kept for other runs is kept whole.
        placement = replace(placement, parts=1 if self._cache else max(self.processes.everyones(placement.parts)))
        if placement != next(placements(work, self.device, self.work)):
            self.listener.message(f"To save memory: {told(placement)}")
        return placement

    def _begin(self) -> None:
        """Claim the output folder, by one process; the others find it claimed for the very same run."""
        if self.processes.first:
            self.artifact.begin(self.identity())
            if not self.artifact.complete:
                self.artifact.check_written()
                self.source.copy_model_files(self.artifact.model_folder)
        self.processes.wait()
        self.artifact.begin(self.identity())

    def take_plan(self, planned: list[PlannedTensor]) -> None:
        """Go on with this plan."""
        self.planned = planned
        solved = {tensor.name: tensor for tensor in planned if tensor.linear}
        self.head = solved.pop(self.architecture.output, None)
        self.linears = solved

    def _smooth(self) -> None:
        """Go on with the smoothed source, where its linears are to be solved."""
        architecture, moved = self.architecture, any(tensor.source_grid == KEPT for tensor in self.planned)
        wanted = [] if moved else pairs(architecture, int(self.source.config["num_hidden_layers"]))
        if found := [pair for pair in wanted if all(name in self.linears for name in pair.takers)]:
            sequences = self.sequences[:SEQUENCES]
            magnitudes = input_magnitudes(self.model(), sequences, self.processes, self.listener, "Sizes of inputs")
            scales = {pair: column_scales(magnitudes[pair.takers[0]]) for pair in found}
            self.source = Smoothed(self.source, scales)

    def _check_output_groups(self) -> None:
        groups = self.recipe.output_groups
        for tensor in self.linears.values():
            if tensor.shape[0] % groups:
                raise UserError(
                    f"{tensor.name} has {tensor.shape[0]} outputs, which {groups} output groups do not divide."
                )

    def _check_experts(self) -> None:
        if not self.architecture.experts:
            return
        options = {"size": self.recipe.size is not None, "asymmetric": self.recipe.asymmetric}
        options |= {"scaling l2qer": bool(self.recipe.rank) and self.recipe.scaling == "l2qer"}
        if given := [name for name, is_given in options.items() if is_given]:
            raise UserError(
                f"{given[0]} cannot be used for experts ({self.architecture.classes[0]}) yet: leave it out."
            )

    def _calibration(self) -> Calibration | None:
        """None where nothing is solved: rounding needs no calibration, and plain types have no grid. A correction
        needs it whatever the method."""
        solved = any(not isinstance(codec_named(tensor.codec_name), PlainCodec) for tensor in self.linears.values())
        if (self.recipe.method == "rtn" and not self.recipe.rank) or not solved:
            return None
        recipe, positions = self.recipe, int(self.source.config.get("max_position_embeddings") or 0)
        if self.architecture.encoder and recipe.sequence_length > positions:
            raise UserError(f"The model has {positions} positions: take at most that as --sequence-length.")
        needed = max(recipe.samples, recipe.tuned_sequences + HELD_OUT) if recipe.tuned_sequences else recipe.samples
        calibration = load_calibration(recipe.calibration, self.source.tokenizer(), samples=needed,
                                       sequence_length=recipe.sequence_length, seed=recipe.seed)  # fmt: skip
        if calibration.repeats:
            self.listener.message(f"The text {recipe.calibration} is too short for {needed} different sequences.")
        return calibration

    @property
    def sequences(self) -> Tensor:
        """Token ids [samples, length] that second moments come from."""
        assert self.calibration is not None
        return self.calibration.tokens[: self.recipe.samples]

    def identity(self) -> dict[str, Any]:
        """What two runs must have in common to write the same artifact, as JSON values."""
        return {
            "versions": versions("lqexport", "torch", "transformers", "numpy", "numba"),
            "recipe": asdict(self.recipe),
            "source_fingerprint": self.source.fingerprint,
            "device": self.device.type,
            "calibration": self.calibration.facts() if self.calibration else None,
        }

    def _moments_facts(self) -> dict[str, Any]:
        """What second moments depend on."""
        assert self.calibration is not None
        recipe = self.recipe
        keys = ("samples", "sequence_length", "seed", "moments", "output_groups", "guided_power", "smooth")
        return {
            "versions": versions("lqexport", "torch", "transformers"),
            "source_fingerprint": self.source.fingerprint,
            "device": self.device.type,
            "calibration": {key: self.calibration.facts()[key] for key in ("sha256", "bos")},
            "recipe": {key: getattr(recipe, key) for key in keys},
            "compute_dtype": recipe.compute_dtype_on(self.device.type),
        }

    def measured(self, what: str) -> Measured:
        """What is known of the losses of this job's options, under its second moments and solver: the same for all
        sizes. `what` names the kind of options."""
        assert self._cache is not None
        facts = {key: value for key, value in asdict(self.recipe).items() if key in MEASURED_BY}
        return Measured(self._cache.measured(what, facts | {"versions": versions("numpy", "numba")}))

    def recipe_of(self, name: str) -> Recipe:
        """The recipe for one linear."""
        if self.recipe.reorders and keeps_order(self.architecture, self.source.config, name):
            return replace(self.recipe, act_order=False)
        if name == self.architecture.output:
            return replace(self.recipe, descent=0)  # many rows, and so wide that little is left to gain
        return self.recipe

    def model(self) -> BlockModel:
        """The full-precision model."""
        return self.model_of(self.source)

    def model_of(self, weights: Weights) -> BlockModel:
        """A model to calibrate with."""
        dtype = getattr(torch, self.recipe.compute_dtype_on(self.device.type))
        return BlockModel(weights, self.device, compute_dtype=dtype)

    def moments(self, model: BlockModel) -> Iterator[BlockMoments]:
        """Second moments of at least the unfinished linears; from the cache where it has them. Each of several
        processes gets those of other blocks."""
        if self._cache is None:
            return self._collect(model, lambda index, group: bool(self.unfinished(model, index, group)))
        blocks = range(len(model))
        if self.processes.agreed(all(index in self._cache for index in blocks)):
            return (self._cache.read(index) for index in self.processes.mine(blocks))
        return self._cache.fill(self._collect(model, lambda *_: True))

    def _collect(self, model: BlockModel, wanted: Callable[[int, Group], bool]) -> Iterator[BlockMoments]:
        recipe, keep, parts = self.recipe, self.placement.moments.keep, self.placement.parts
        if recipe.moments == "guided":
            # Where they are measured first, asymmetric calibration takes its weights of the tokens from the same pass.
            weights = self._kept_weights().write if recipe.asymmetric else None
            return guided_moments(model, self.sequences, recipe.output_groups, self.work / "guided", self.listener,
                                  self.processes, keep, self._held(), recipe.guided_power, weights, parts)  # fmt: skip
        groups = model.architecture.linears_of
        last = max(index for index in range(len(model)) for group in groups(index) if wanted(index, group))
        return forward_moments(model, self.sequences, self.kind, wanted, last, self.processes, keep, parts,
                               self.placement.hidden.keep)  # fmt: skip

    def token_weights(self, model: BlockModel) -> dict[str, Tensor]:
        """Each linear's guided weights of the tokens, float32 [tokens], by the weight's name; kept with the second
        moments, or until the run is done."""
        kept = self._kept_weights()
        if not self.processes.agreed(all(index in kept for index in range(len(model)))):
            kinds = [partial(TokenWeights, power=self.recipe.guided_power)]
            passed = guided_pass(model, self.sequences, kinds, self.work / "guided", self.listener, self.processes,
                                 self._held())  # fmt: skip
            for _ in kept.fill(weights for (weights,) in passed):
                pass
            self.processes.wait()
        blocks = (by_weight(model, kept.read(index)) for index in range(len(model)))
        return {name: weights for block in blocks for name, weights in block.items()}

    def _kept_weights(self) -> MomentsCache:
        return MomentsCache(self._weights, self._moments_facts())

    def _held(self) -> bool:
        """Whether the guided pass keeps its states in memory."""
        return self.placement.states and self.processes.count == 1

    def unfinished(self, model: BlockModel, index: int, group: Group) -> list[str]:
        """Names of a group's linears that are still to be solved."""
        return [name for linear in group if self.is_unfinished(name := model.weight_name(index, linear))]

    def is_unfinished(self, name: str) -> bool:
        """Whether the solver has to do this tensor."""
        # A shape that no grid holds is stored already, as F16, and is no linear of the plan.
        return name in self.linears and name not in self.artifact
