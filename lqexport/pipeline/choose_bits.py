"""Shares the recipe's bits per weight among the linears: mixes of widths for EXL2, one width for each linear for EXL3.

The loss of every choice is found for every linear. Then the best choices of all linears are taken together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from lqexport.errors import AGAIN, well_formed
from lqexport.pipeline.allocate import Allocation
from lqexport.pipeline.exl2_mixes import chosen_mixes, mix_losses
from lqexport.pipeline.exl3_bits import chosen_widths, width_losses
from lqexport.pipeline.job import Job
from lqexport.pipeline.measured_losses import Losses, measure_linears, measured_losses
from lqexport.solver.weight_checks import check_weights
from lqexport.storage.files import read_json, write_json


@dataclass(frozen=True)
class Choices:
    """The choices that a format gives each linear.

    noun     the choices, in the name of the folder that keeps their losses and in what a run shows
    losses   weight, second moments, settings and whether these are guided -> the loss of each choice
    best     losses and shapes of all linears, and bits per weight -> the best choices together
    """

    noun: str
    losses: Callable[..., dict[str, float]]
    best: Callable[[Losses, dict[str, tuple[int, int]], float], Allocation]


CHOICES = {
    "exl2": Choices("mixes", mix_losses, chosen_mixes),
    "exl3": Choices("widths", width_losses, chosen_widths),
}
"""Family of a target -> its choices."""


def choose_bits(job: Job) -> tuple[Job, Allocation | None]:
    """Returns the job with the choices that lose least within the recipe's bits per weight.

    For a target without bits per weight, and without calibration, the job stays as it is, and the allocation is None.
    """
    if job.recipe.bits is None or job.calibration is None:
        return job, None
    choices = CHOICES[job.recipe.parsed_target.family]
    path = job.artifact.folder / "mixes.json"
    if job.processes.from_first(not path.is_file()):
        losses = _measured(job, choices)
        if job.processes.first:
            write_json(path, losses)
        job.processes.wait()
    shapes = {name: linear.matrix for name, linear in job.linears.items()}
    with well_formed(path, AGAIN):
        allocation = choices.best(read_json(path, f"{path} is gone."), shapes, job.recipe.bits)
    chosen = {name: option.name for name, option in allocation.chosen.items()}
    planned = [replace(tensor, codec_name=chosen.get(tensor.name, tensor.codec_name)) for tensor in job.planned]
    return replace(job, planned=planned), allocation


def _measured(job: Job, choices: Choices) -> Losses:
    """Returns the loss of every choice for every linear. What an earlier run, also for another size, found is kept."""
    measured = measured_losses(job, choices.noun)
    if missing := job.processes.from_first(job.linears.keys() - measured.losses().keys()):

        def losses_of(name: str, weight: Tensor, hessian: Tensor) -> dict[str, float]:
            check_weights(name, weight, job.linears[name].codec_name)
            settings = job.recipe_of(name).solver_settings
            return choices.losses(weight, hessian, settings, guided=job.recipe.moments == "guided")

        measure_linears(job, measured, missing, f"Measuring {choices.noun}", losses_of)
        job.processes.wait()
    losses = measured.losses()
    return {name: losses[name] for name in job.linears}
