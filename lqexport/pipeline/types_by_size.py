"""Types by size: the type of every tensor is chosen so that the whole model loses least at a given size.

The size decides which types each tensor may have (`lqexport.planning.type_choices`). The loss of each tensor in each of
them is measured once. Rows of a linear are solved (error feedback, no descent) under its guided second moments, whose
loss estimates nats per token of the model (`lqexport.calibration.moments`). The embedding and the output are rounded,
and the model's KL divergence is measured with that tensor alone replaced (`lqexport.pipeline.outer_losses`). The losses
are added up, and `lqexport.pipeline.allocate` finds the choice of least sum within the size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from lqexport.converters.plan import PlannedTensor
from lqexport.errors import AGAIN, well_formed
from lqexport.pipeline.allocate import allocate, reachable
from lqexport.pipeline.job import Job
from lqexport.pipeline.measured_losses import (
    Losses,
    measure_linears,
    measured_losses,
    options,
)
from lqexport.pipeline.outer_losses import measure_outer
from lqexport.pipeline.type_losses import type_losses
from lqexport.planning.recipe_plan import plan_recipe
from lqexport.planning.type_choices import choices_by_size
from lqexport.storage.files import read_json, write_json

CURVE_POINTS = 16
"""Sizes for which the least loss is computed, from the smallest choice to the largest."""


def choose_types(job: Job) -> tuple[Job, dict[str, Any] | None]:
    """Returns the job with the types that lose least within the recipe's size, and the choice as budget.json keeps it.

    Every tensor is measured in every type first. Without a size the job stays as it is, and the choice is None. Raises
    UserError if no choice of types fits into the size.
    """
    if job.limit_bytes is None:
        return job, None
    path = job.artifact.folder / "budget.json"
    if job.processes.from_first(not path.is_file()):
        choice = _measured_choice(job, job.limit_bytes)
        if job.processes.first:
            write_json(path, choice)
        job.processes.wait()
    stored: dict[str, Any] = read_json(path, f"{path} is gone.")
    with well_formed(path, AGAIN):
        return replace(job, planned=plan_recipe(job.source, job.recipe, stored["chosen"])), stored


def _measured_choice(job: Job, limit_bytes: int) -> dict[str, Any]:
    """Measures the losses that are still unknown, and returns the best choice within the limit."""
    choices = choices_by_size(job.planned, job.recipe, limit_bytes)
    measured = measured_losses(job, "types")
    known = measured.losses()
    unknown = [name for name, codecs in choices.items() if not set(codecs) <= known.get(name, {}).keys()]
    missing = job.processes.from_first(unknown)
    if linears := [name for name in missing if name in job.linears]:

        def losses_of(name: str, weight: Tensor, hessian: Tensor) -> dict[str, float]:
            return type_losses(name, weight, hessian, choices[name], job.recipe.solver_settings)

        measure_linears(job, measured, linears, "Measuring types", losses_of)
    outer = job.processes.share_of([name for name in missing if name not in job.linears])
    job.listener.stage("Measuring embedding and output", len(outer))
    settings = job.recipe.solver_settings if job.head else None
    measure_outer(
        job.source, {name: choices[name] for name in outer}, job.sequences, job.device, measured, job.listener, settings
    )
    job.processes.wait()
    everything = measured.losses()
    losses = {name: {codec: everything[name][codec] for codec in codecs} for name, codecs in choices.items()}
    return best_choice(job.planned, losses, limit_bytes)


def best_choice(planned: list[PlannedTensor], losses: Losses, limit_bytes: int) -> dict[str, Any]:
    """Returns the choice of least loss within a limit, with all losses and the curve of loss over bytes, as JSON.

    Raises UserError if no choice fits, naming the sizes that can be reached.
    """
    # A tensor that was not measured keeps the codec of its plan.
    known = {tensor.name: losses.get(tensor.name, {tensor.codec_name: 0.0}) for tensor in planned}
    tensors = {tensor.name: options(known[tensor.name], tensor.matrix) for tensor in planned}
    best = allocate(tensors, limit_bytes)
    least, most = reachable(tensors)
    sizes = [least + (most - least) * i // (CURVE_POINTS - 1) for i in range(CURVE_POINTS)]
    return {
        "limit_bytes": limit_bytes,
        "tensor_bytes": best.nbytes,
        "predicted_kl": best.loss,
        "predicted_kl_gap": best.gap,
        "chosen": {name: option.name for name, option in best.chosen.items() if name in losses},
        "losses": losses,
        "curve": [{"bytes": size, "loss": allocate(tensors, size).loss} for size in sizes],
    }
