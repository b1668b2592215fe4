"""Predicts what a linear loses in each of several types, from its rows solved by error feedback alone."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lqexport.pipeline.measured_losses import sampled_rows
from lqexport.planning.type_choices import RELATIVES
from lqexport.recipe import SolverSettings
from lqexport.runtime.placement import all_on_device
from lqexport.solver.cholesky import CholeskyFactor
from lqexport.solver.linear import factor_of, solve_linear, unit_of

RATIO_ROWS = 64
"""Rows on which an i-quant is compared with its relative. The ratio of their losses differs little from row to row."""


def type_losses(
    name: str, weight: Tensor, hessian: Tensor, codec_names: tuple[str, ...], settings: SolverSettings
) -> dict[str, float]:
    """Returns the predicted loss of a linear in each codec, in nats per token of the model.

    weight    float32 [R, C]
    hessian   guided second moments [C, C], or [G, C, C] for G output groups, which are averaged

    An i-quant takes several times as long to solve as its relative (`RELATIVES`), so it is solved for few rows. Its
    loss is the relative's times the ratio of their losses on these rows.
    """
    settings = replace(settings, descent=0)
    hessian = hessian.reshape(-1, weight.shape[1], weight.shape[1]).mean(0)
    placement, factors = all_on_device(hessian.device), dict[int, CholeskyFactor]()

    def loss(rows: Tensor, codec: str) -> float:
        unit = unit_of([codec])
        if unit not in factors:
            factors[unit] = factor_of(name, hessian, settings, placement, unit)
        solved = solve_linear(name, rows, hessian, codec, settings, placement, factors[unit])
        return 0.5 * len(weight) / len(rows) * float(solved.facts["loss"])

    sample = sampled_rows(weight)
    few = sampled_rows(sample, RATIO_ROWS)
    losses = {codec: loss(sample, codec) for codec in codec_names if codec not in RELATIVES}
    i_quants = {codec: RELATIVES[codec] for codec in codec_names if codec in RELATIVES}
    of_few = {relative: loss(few, relative) for relative in dict.fromkeys(i_quants.values())}
    for codec, relative in i_quants.items():
        ours, theirs = loss(few, codec), of_few[relative]
        losses[codec] = losses[relative] * ours / theirs if theirs > 0 else ours
    return losses
