"""Mixes of widths for EXL2: the loss of every mix is measured for every linear, then the best mixes are allocated.

The loss of a mix is the linear's loss after error feedback, before coordinate descent, on an even sample of its rows.
The losses of all linears are added. Guided second moments give them in nats per token of the model. Other second
moments do not say how much the model depends on a linear, so there the loss is relative to the energy of the linear's
output.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor

from lqexport.converters.exl2.plan import filled_runs
from lqexport.formats.codec import Run
from lqexport.formats.exl2 import BITS, UNIT, Exl2
from lqexport.grids.fit_sections import fit_sections
from lqexport.grids.sections import TensorSections
from lqexport.pipeline.allocate import Allocation, allocate
from lqexport.pipeline.measured_losses import Losses, options, sampled_rows
from lqexport.recipe import SolverSettings
from lqexport.solver.cholesky import CholeskyFactor, factorize
from lqexport.solver.feedback import feedback, layer_loss
from lqexport.solver.importance import importance

AVERAGES = (2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75, 4.0, 4.5, 5.0, 5.5, 6.0)
"""Mean widths, in bits, of the mixes that are tried besides the pure widths."""


def mix_losses(weight: Tensor, hessian: Tensor, settings: SolverSettings, *, guided: bool) -> dict[str, float]:
    """Returns the predicted loss of a linear in every mix, by the name of the mix's codec.

    weight    float32 [R, C]; a sample of its rows is solved. Rows share a maximum, so a sample gets a slightly better
              one than all rows would
    hessian   second moments [C, C]
    guided    whether these are guided, so that losses are in nats per token
    """
    cholesky = factorize(hessian, settings.dampening, settings.act_order)
    weights = importance(hessian, cholesky, settings.importance, settings.exponent)
    sample = sampled_rows(weight)
    unit = 0.5 * len(weight) / len(sample) if guided else 1 / max(layer_loss(sample, hessian), 1e-30)
    pure = {bits: fit_sections(_pure(bits, weight.shape[1]), sample, weights, cholesky.order) for bits in BITS}
    losses = {}
    for runs in _mixes(hessian, cholesky):
        grid = _assembled(runs, pure)
        error = grid.values(feedback(sample, grid, cholesky)) - sample
        losses[Exl2(runs).name] = unit * layer_loss(error, hessian)
    return losses


def _pure(bits: int, columns: int) -> Exl2:
    return Exl2((Run(bits, UNIT, columns // UNIT),))


def _assembled(runs: tuple[Run, ...], pure: dict[int, TensorSections]) -> TensorSections:
    """Returns the grid of a mix. Groups are fitted one by one, so each is as in the grid of its width alone."""
    parts, start = [], 0
    for run in runs:
        parts.append(pure[run.bits].sections[0].part(slice(start, start + run.count)))
        start += run.count
    return replace(pure[runs[0].bits], sections=tuple(parts))


def _mixes(hessian: Tensor, cholesky: CholeskyFactor) -> list[tuple[Run, ...]]:
    """Returns the pure widths, and mixes that give more bits to the units of 32 stored columns whose errors weigh more.

    The error of a column weighs H_ii if no other column makes up for it, and U_ii^-2 if the columns after it make up
    for all they can. The geometric mean of the two predicts best (docs/exl2.md).
    """
    energy = hessian.diagonal()[cholesky.order].double().clamp_min(0)
    remaining = cholesky.diagonal().square().reciprocal()
    unit_weights = (energy * remaining).sqrt().unflatten(0, (-1, UNIT)).mean(1).cpu().numpy()
    pure = [_pure(bits, UNIT * len(unit_weights)).runs for bits in BITS]
    return list(dict.fromkeys([*pure, *(filled_runs(unit_weights, average) for average in AVERAGES)]))


def chosen_mixes(losses: Losses, shapes: dict[str, tuple[int, int]], bits: float) -> Allocation:
    """Returns the mix of every linear, all together at most `bits` per weight.

    Raises UserError if no mixes are so small.
    """
    weights = sum(int(np.prod(shape)) for shape in shapes.values())
    return allocate({name: options(losses[name], shape) for name, shape in shapes.items()}, int(bits * weights / 8))
