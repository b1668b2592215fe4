"""Which widths each linear of an EXL2 model gets: what every mix would cost is measured, then the best are allocated.

A mix costs the linear's loss after error feedback, before coordinate descent, on an even sample of its rows. Losses of
all linears are added. Guided second moments give them in nats per token of the model; others do not say how much the
model depends on a linear, so there the loss is taken relative to the energy of the linear's output.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
from torch import Tensor

from lqexport.allocate import Allocation, Option, allocate
from lqexport.collect import begin_with_first, by_weight
from lqexport.converters.exl2_plan import filled_runs
from lqexport.fit_sections import fit_sections
from lqexport.formats.codec import Run, nbytes
from lqexport.formats.exl2 import BITS, UNIT, Exl2
from lqexport.job import Job
from lqexport.moments import importance
from lqexport.recipe import Recipe
from lqexport.sections import TensorSections
from lqexport.solve import Factor, factorize, feedback, layer_loss

AVERAGES = (2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75, 4.0, 4.5, 5.0, 5.5, 6.0)
"""Mean widths of the mixes that are tried besides the pure widths."""
SAMPLED_ROWS = 256


def choose_mixes(job: Job) -> Allocation | None:
    """EXL2: measure what each mix of widths costs each linear, and plan the job anew with those that cost least within
    the size."""
    if job.recipe.bits is None or job.calibration is None:
        return None
    _measure_mixes(job)
    blocks = range(job.source.config["num_hidden_layers"])
    options = {name: tried for index in blocks for name, tried in job.artifact.options(index).items()}
    allocation = chosen_mixes(options, {name: linear.matrix for name, linear in job.linears.items()}, job.recipe.bits)
    chosen = {name: option.name for name, option in allocation.chosen.items()}
    job.take_plan([replace(tensor, codec=chosen.get(tensor.name, tensor.codec)) for tensor in job.planned])
    return allocation


def _measure_mixes(job: Job) -> None:
    """Store the options of every block's linears; those that an interrupted run stored stay."""
    model = job.model()
    missing = job.processes.agreed({index for index in range(len(model)) if not job.artifact.options(index)})
    if not missing:
        return
    begin = partial(job.listener.stage, "Measuring mixes of widths", len(missing))
    for block in begin_with_first(job.moments(model), begin):
        if block[0] not in missing:
            continue
        found = {}
        for name, hessian in by_weight(model, block).items():
            weight = job.source.read(name).to(job.device).float()
            found[name] = measured_options(weight, hessian.to(job.device), job.recipe_of(name))
        job.artifact.write_options(block[0], found)
        job.listener.advance(job.processes.count)
    job.processes.wait()


def measured_options(weight: Tensor, hessian: Tensor, recipe: Recipe) -> list[Option]:
    """Every mix for a linear, with its bytes and predicted loss: float32 weight [R, C], hessian [C, C].

    A maximum is shared by all rows, so a sample of rows gets a slightly better one than all would.
    """
    factor = factorize(hessian.double(), recipe.dampening, recipe.act_order)
    weights = importance(hessian, factor, recipe.importance, recipe.exponent)
    sample = weight[:: max(1, len(weight) // SAMPLED_ROWS)].contiguous()
    if recipe.moments == "guided":
        unit = 0.5 * len(weight) / len(sample)
    else:
        unit = 1 / max(layer_loss(sample, hessian), 1e-30)
    pure = {bits: fit_sections(_pure(bits, weight.shape[1]), sample, weights, factor.order) for bits in BITS}
    options = []
    for runs in _mixes(hessian, factor):
        grid = _assembled(runs, pure)
        error = grid.values(feedback(sample, grid, factor)) - sample
        codec = Exl2(runs)
        options.append(Option(codec.name, nbytes(codec, *weight.shape), unit * layer_loss(error, hessian)))
    return options


def _pure(bits: int, columns: int) -> Exl2:
    return Exl2((Run(bits, UNIT, columns // UNIT),))


def _assembled(runs: tuple[Run, ...], pure: dict[int, TensorSections]) -> TensorSections:
    """The grid of a mix, each of its groups as in the grid of that width alone, since groups are fitted one by one."""
    parts, start = [], 0
    for run in runs:
        parts.append(pure[run.bits].sections[0].part(slice(start, start + run.count)))
        start += run.count
    return replace(pure[runs[0].bits], sections=tuple(parts))


def _mixes(hessian: Tensor, factor: Factor) -> list[tuple[Run, ...]]:
    """Pure widths, and mixes that give more bits to the units of 32 stored columns whose errors weigh more.

    What the error of a column weighs is H_ii where nothing makes up for it, and U_ii^-2 where the columns after it make
    up for all they can; the geometric mean of the two predicts best (docs/exl2.md).
    """
    energy = hessian.diagonal()[factor.order].double().clamp_min(0)
    left = factor.upper.diagonal().double().square().reciprocal()
    weigh = (energy * left).sqrt().unflatten(0, (-1, UNIT)).mean(1).cpu().numpy()
    pure = [_pure(bits, UNIT * len(weigh)).runs for bits in BITS]
    return list(dict.fromkeys([*pure, *(filled_runs(weigh, average) for average in AVERAGES)]))


def chosen_mixes(options: dict[str, list[Option]], shapes: dict[str, tuple[int, int]], bits: float) -> Allocation:
    """The mix of every linear, all together at most `bits` per weight. Raises UserError where that is too little."""
    weights = sum(int(np.prod(shape)) for shape in shapes.values())
    return allocate(options, int(bits * weights / 8))
