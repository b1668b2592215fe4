"""The first stage of a run: opens the source, plans, checks, calibrates, claims the folder, chooses the placement."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lqexport.calibration.moments_cache import MomentsCache
from lqexport.calibration.sequences import Calibration
from lqexport.converters.models.architecture import CUT
from lqexport.converters.models.architectures import architecture_of
from lqexport.converters.models.value_heads import TILED
from lqexport.converters.plan import PlannedTensor
from lqexport.errors import UserError
from lqexport.models.column_order import source_of
from lqexport.models.imatrix import imatrix_of
from lqexport.models.source import Source
from lqexport.pipeline.job import Job, work_folder
from lqexport.pipeline.smooth_source import pairs_to_smooth
from lqexport.planning.calibration_text import calibration_warnings, read_calibration
from lqexport.planning.compute_dtype import with_compute_dtype
from lqexport.planning.cost import Work
from lqexport.planning.defaults import settled
from lqexport.planning.memory import MemoryLimits, choose_placement, placement_sentence, placements
from lqexport.planning.needs import warnings_of
from lqexport.planning.output_folder import identity_of
from lqexport.planning.recipe_plan import calibrates, check_sequence_length, plan_factors, plan_recipe, size_limit
from lqexport.planning.type_choices import check_size
from lqexport.recipe import Recipe
from lqexport.runtime.environment import versions
from lqexport.runtime.placement import Placement
from lqexport.runtime.processes import Processes
from lqexport.runtime.progress import Listener
from lqexport.storage.artifact import Artifact


def prepare(
    recipe: Recipe, out: Path, cache: Path | None, *, device: torch.device, processes: Processes, listener: Listener,
    limits: MemoryLimits,
) -> Job:  # fmt: skip
    """Returns the job of a run, whose output folder it has claimed.

    cache    a folder that keeps second moments for other runs; None for none
    limits   the memory to fit into

    Raises UserError for bad input: a source that cannot be read, a recipe that does not go with it, a folder that
    holds something else.
    """
    listener.stage("Open the source and plan", 0)
    source = source_of(recipe)
    recipe = settled(recipe, source.config)
    planned = plan_recipe(source, recipe)
    factors = plan_factors(source, planned, recipe)
    check_recipe(recipe, source.config, planned)
    check_sequence_length(recipe, source, planned)
    limit_bytes = size_limit(source, recipe, planned)
    check_size(recipe, planned, limit_bytes)
    artifact = Artifact(out)
    recipe = _with_compute_dtype(Work(recipe, source.config, planned), artifact, device, processes, listener)
    if not artifact.complete:
        for sentence in warnings_of(source, recipe, planned):
            listener.message(sentence)
    calibration, imatrix = _calibration(recipe, source, planned, listener), imatrix_of(source, recipe)
    identity = _identity(recipe, source, calibration, device)
    identity |= imatrix.facts() if imatrix else {}
    _claim(artifact, identity, source, processes)
    moments_cache, token_weights_cache = None, None
    if calibration is not None:
        facts = _moments_facts(recipe, source, planned, calibration, device)
        moments_cache, token_weights_cache = _caches(recipe, facts, cache, work_folder(artifact))
    placement = _placement(
        Work(recipe, source.config, planned), artifact, device, processes, listener, limits,
        whole_blocks=moments_cache is not None,
    )  # fmt: skip
    if moments_cache and processes.first:
        moments_cache.write_facts()
    return Job(
        recipe=recipe, identity=identity, source=source, planned=planned, limit_bytes=limit_bytes, factors=factors,
        calibration=calibration, imatrix=imatrix, artifact=artifact, moments_cache=moments_cache,
        token_weights_cache=token_weights_cache, placement=placement, device=device, processes=processes,
        listener=listener,
    )  # fmt: skip


def _with_compute_dtype(
    work: Work, artifact: Artifact, device: torch.device, processes: Processes, listener: Listener
) -> Recipe:
    """Returns the recipe with the dtype of its passes, the same in all processes, and says how it was chosen."""
    chosen, sentence = work.recipe, ""
    if processes.first:
        begun = artifact.run().get("recipe") if (artifact.folder / "run.json").is_file() else None
        chosen, sentence = with_compute_dtype(work, device.type, begun)
    if sentence and not artifact.complete:
        listener.message(sentence)
    return processes.from_first(chosen)


def check_recipe(recipe: Recipe, config: dict[str, Any], planned: list[PlannedTensor]) -> None:
    """Raises UserError if the recipe does not go with the model of this config.json."""
    architecture = architecture_of(config)
    for tensor in planned:
        if tensor.linear and tensor.name != architecture.output and tensor.shape[0] % recipe.output_groups:
            raise UserError(
                f"{tensor.name} has {tensor.shape[0]} outputs, which {recipe.output_groups} output groups do not "
                "divide: take another number of them."
            )
    if architecture.experts:
        _check_experts(recipe, architecture.classes[0])
    if architecture.encoder and recipe.size is not None:
        raise UserError("Types are chosen by size for models that predict tokens: give an encoder's target a type.")


def _check_experts(recipe: Recipe, model_class: str) -> None:
    """Raises UserError for options that experts do not have."""
    options = {"size": recipe.size is not None, "asymmetric": recipe.asymmetric}
    options |= {"scaling l2qer": bool(recipe.rank) and recipe.scaling == "l2qer"}
    if given := [name for name, is_given in options.items() if is_given]:
        raise UserError(f"{given[0]} cannot be used for experts ({model_class}) yet: leave it out.")


def _calibration(
    recipe: Recipe, source: Source, planned: list[PlannedTensor], listener: Listener
) -> Calibration | None:
    """Returns the calibration sequences; None if nothing is solved."""
    if not calibrates(recipe, source, planned):
        return None
    listener.stage(f"Read the calibration text {recipe.calibration}", 0)
    calibration = read_calibration(recipe, source, planned)
    for sentence in calibration_warnings(recipe, source.config, calibration):
        listener.message(sentence)
    return calibration


def _identity(recipe: Recipe, source: Source, calibration: Calibration | None, device: torch.device) -> dict[str, Any]:
    """Returns what two runs must have in common to write the same artifact, as JSON values."""
    return identity_of(recipe, source) | {
        "device": device.type,
        "calibration": calibration.facts() if calibration else None,
    }


def _moments_facts(
    recipe: Recipe, source: Source, planned: list[PlannedTensor], calibration: Calibration, device: torch.device
) -> dict[str, Any]:
    """Returns what second moments depend on, as JSON values.

    The target decides some of it: which linears and columns the source is read with, and what is smoothed.
    """
    keys = ("samples", "sequence_length", "seed", "moments", "output_groups", "guided_power")
    return {
        "versions": versions("lqexport", "torch", "transformers"),
        "source_fingerprint": source.fingerprint,
        "device": device.type,
        "calibration": {key: calibration.facts()[key] for key in ("sha256", "bos")},
        "tokens": calibration.tokens_sha256(recipe.samples),
        "recipe": {key: getattr(recipe, key) for key in keys},
        "compute_dtype": recipe.compute_dtype_on(device.type),
        "rearranged": [key for key in (CUT, TILED) if source.config.get(key)],
        "smoothed": [pair.giver for pair in pairs_to_smooth(recipe, source.config, planned)],
    }


def _caches(
    recipe: Recipe, facts: dict[str, Any], folder: Path | None, work: Path
) -> tuple[MomentsCache | None, MomentsCache]:
    """Returns the caches of second moments, if anything needs them again, and of the tokens' weights.

    facts    what second moments depend on
    folder   the folder that keeps them for other runs; None for none
    work     the folder for what a stopped run goes on from
    """
    if recipe.chooses_types and folder is None:  # the choice needs all second moments before solving does
        folder = work / "moments"
    return MomentsCache(folder, facts) if folder else None, MomentsCache((folder or work) / "weights", facts)


def _claim(artifact: Artifact, identity: dict[str, Any], source: Source, processes: Processes) -> None:
    """Claims the output folder in the first process; the others find it claimed for the very same run."""
    if processes.first:
        artifact.begin(identity)
        if not artifact.complete:
            artifact.check_written()
            source.copy_model_files(artifact.model_folder)
    processes.wait()
    artifact.begin(identity)


def _placement(
    work: Work, artifact: Artifact, device: torch.device, processes: Processes, listener: Listener,
    limits: MemoryLimits, *, whole_blocks: bool,
) -> Placement:  # fmt: skip
    """Returns where large tensors are kept, the same in all processes; says so if it is not simply the device.

    whole_blocks   second moments of a block are kept for other runs, so its experts come in one part
    """
    folder = work_folder(artifact)
    placement = choose_placement(work, device, folder, limits)
    placement = replace(placement, parts=1 if whole_blocks else max(processes.gathered(placement.parts)))
    if placement != next(placements(work, device, folder)):
        listener.message(f"To save memory: {placement_sentence(placement)}")
    return placement
