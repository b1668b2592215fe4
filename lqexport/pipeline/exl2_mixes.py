"""Which widths each linear of an EXL2 model gets: what every mix would cost is measured, then the best are allocated.

A mix costs the linear's loss after error feedback, before coordinate descent, on an even sample of its rows. Losses of
all linears are added. Guided second moments give them in nats per token of the model; others do not say how much the
model depends on a linear, so there the loss is taken relative to the energy of the linear's output.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor

from lqexport.converters.exl2.plan import filled_runs
from lqexport.errors import AGAIN, well_formed
from lqexport.formats.codec import Run
from lqexport.formats.exl2 import BITS, UNIT, Exl2
from lqexport.grids.fit_sections import fit_sections
from lqexport.grids.sections import TensorSections
from lqexport.pipeline import measured_losses as measured
from lqexport.pipeline.allocate import Allocation, allocate
from lqexport.pipeline.job import Job
from lqexport.pipeline.measured_losses import Losses
from lqexport.recipe import Recipe
from lqexport.solver.cholesky import CholeskyFactor, factorize
from lqexport.solver.feedback import feedback, layer_loss
from lqexport.solver.importance import importance
from lqexport.storage.files import read_json, write_json

AVERAGES = (2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75, 4.0, 4.5, 5.0, 5.5, 6.0)
"""Mean widths of the mixes that are tried besides the pure widths."""
SAMPLED_ROWS = 256


def choose_mixes(job: Job) -> Allocation | None:
    """EXL2: measure what each mix of widths costs each linear, and plan the job anew with those that cost least within
    the size."""
    if job.recipe.bits is None or job.calibration is None:
        return None
    path = job.artifact.folder / "mixes.json"
    if job.processes.agreed(not path.is_file()):
        losses = _measured_mixes(job)
        if job.processes.first:
            write_json(path, losses)
        job.processes.wait()
    shapes = {name: linear.matrix for name, linear in job.linears.items()}
    with well_formed(path, AGAIN):
        allocation = chosen_mixes(read_json(path, f"{path} is gone."), shapes, job.recipe.bits)
    chosen = {name: option.name for name, option in allocation.chosen.items()}
    job.take_plan([replace(tensor, codec_name=chosen.get(tensor.name, tensor.codec_name)) for tensor in job.planned])
    return allocation


def _measured_mixes(job: Job) -> Losses:
    """What every mix costs every linear; what an interrupted run or one for another size measured is not done again."""
    kept = job.measured("mixes")
    if missing := job.processes.agreed(job.linears.keys() - kept.losses().keys()):

        def losses_of(name: str, weight: Tensor, hessian: Tensor) -> dict[str, float]:
            return mix_losses(weight, hessian, job.recipe_of(name))

        measured.measure_linears(job, kept, missing, "Measuring mixes of widths", losses_of)
        job.processes.wait()
    losses = kept.losses()
    return {name: losses[name] for name in job.linears}


def mix_losses(weight: Tensor, hessian: Tensor, recipe: Recipe) -> dict[str, float]:
    """The predicted loss of a linear in every mix, by the name of its codec: float32 weight [R, C], hessian [C, C].

    A maximum is shared by all rows, so a sample of rows gets a slightly better one than all would.
    """
    factor = factorize(hessian, recipe.dampening, recipe.act_order)
    weights = importance(hessian, factor, recipe.importance, recipe.exponent)
    sample = weight[:: max(1, len(weight) // SAMPLED_ROWS)].contiguous()
    if recipe.moments == "guided":
        unit = 0.5 * len(weight) / len(sample)
    else:
        unit = 1 / max(layer_loss(sample, hessian), 1e-30)
    pure = {bits: fit_sections(_pure(bits, weight.shape[1]), sample, weights, factor.order) for bits in BITS}
    losses = {}
    for runs in _mixes(hessian, factor):
        grid = _assembled(runs, pure)
        error = grid.values(feedback(sample, grid, factor)) - sample
        losses[Exl2(runs).name] = unit * layer_loss(error, hessian)
    return losses


def _pure(bits: int, columns: int) -> Exl2:
    return Exl2((Run(bits, UNIT, columns // UNIT),))


def _assembled(runs: tuple[Run, ...], pure: dict[int, TensorSections]) -> TensorSections:
    """The grid of a mix, each of its groups as in the grid of that width alone, since groups are fitted one by one."""
    parts, start = [], 0
    for run in runs:
        parts.append(pure[run.bits].sections[0].part(slice(start, start + run.count)))
        start += run.count
    return replace(pure[runs[0].bits], sections=tuple(parts))


def _mixes(hessian: Tensor, factor: CholeskyFactor) -> list[tuple[Run, ...]]:
    """Pure widths, and mixes that give more bits to the units of 32 stored columns whose errors weigh more.

    What the error of a column weighs is H_ii where nothing makes up for it, and U_ii^-2 where the columns after it make
    up for all they can; the geometric mean of the two predicts best (docs/exl2.md).
    """
    energy = hessian.diagonal()[factor.order].double().clamp_min(0)
    left = factor.diagonal().square().reciprocal()
    weigh = (energy * left).sqrt().unflatten(0, (-1, UNIT)).mean(1).cpu().numpy()
    pure = [_pure(bits, UNIT * len(weigh)).runs for bits in BITS]
    return list(dict.fromkeys([*pure, *(filled_runs(weigh, average) for average in AVERAGES)]))


def chosen_mixes(losses: Losses, shapes: dict[str, tuple[int, int]], bits: float) -> Allocation:
    """The mix of every linear, all together at most `bits` per weight. Raises UserError where that is too little."""
    weights = sum(int(np.prod(shape)) for shape in shapes.values())
    return allocate(
        {name: measured.options(losses[name], shape) for name, shape in shapes.items()}, int(bits * weights / 8)
    )
