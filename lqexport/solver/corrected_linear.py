"""Solves a linear together with its low-rank correction B A.

The low-rank factors A and B are stored as tensors of their own, named by `lqexport.converters.factors`. In this module
`down` is A [k, C] and `up` is B [R, k].
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lqexport.converters.factors import block_codec, factor_names
from lqexport.formats.registry import codec_named
from lqexport.recipe import CorrectionSettings, SolverSettings
from lqexport.solver.cholesky import CholeskyFactor
from lqexport.solver.feedback import layer_loss
from lqexport.solver.linear import solve_linear
from lqexport.solver.lowrank import column_weighting, correction, loss_by_rank
from lqexport.solver.rounded_tensor import round_tensor
from lqexport.storage.artifact import Artifact, StoredTensor, values_of


def stored_correction(artifact: Artifact, name: str) -> Tensor | None:
    """Returns the stored correction B A of a linear, float32 [R, C]; None if the artifact has none."""
    down, up = factor_names(name)
    return values_of(artifact.read(up)) @ values_of(artifact.read(down)) if down in artifact else None


def solve_corrected(
    name: str,
    weight: Tensor,
    hessian: Tensor,
    magnitudes: Tensor | None,
    codec_name: str,
    settings: SolverSettings,
    low_rank: CorrectionSettings,
    cholesky: CholeskyFactor | None = None,
) -> list[StoredTensor]:
    """Returns the low-rank factors A and B, and then the linear; with `low_rank.merge` the corrected linear alone.

    weight       float32 [R, C]
    hessian      second moments [C, C], or [G, C, C] for G equal runs of rows: the factors then take their mean
    magnitudes   float32 [C], needed for the scaling l2qer alone (see `lowrank.column_weighting`)
    codec_name   the codec of the linear; the factors have `low_rank.factors`
    cholesky     as for `solve_linear`

    Each of `low_rank.rounds` rounds solves the codes for the weights minus the correction so far. It then computes the
    correction of the error that those codes leave.

    The linear has the facts of `solve_linear` and the fact `correction`. `energy` is the output's energy. `losses` are
    the losses that remain with the first 0, `step`, 2 `step` ... ranks of the stored factors, up to all of them.

    Raises UserError as `solve_linear` does, and if `low_rank.factors` names no codec that can hold factors.
    """
    groups = hessian.reshape(-1, weight.shape[1], weight.shape[1])
    weighting = column_weighting(low_rank.scaling, groups.mean(0), magnitudes)
    target = weight
    for _ in range(low_rank.rounds):
        base = solve_linear(name, target, hessian, codec_name, settings, cholesky=cholesky)
        error = weight - values_of(base).to(weight.device)
        up, down = correction(error, weighting, low_rank.rank)
        target = weight - up @ down
    factor_codec = block_codec(low_rank.factors, "factors")
    factors = [
        round_tensor(name, matrix, factor_codec) for name, matrix in zip(factor_names(name), (down, up), strict=True)
    ]
    losses = _losses(error, groups, *map(values_of, factors))
    facts = base.facts | _facts(error, weight, groups)
    step, energy = codec_named(factor_codec).block, max(_loss(weight, groups), 1e-30)
    facts["correction"] = {"step": step, "losses": losses[::step].tolist(), "energy": energy}
    base = replace(base, facts=facts)
    return [_merged(base, weight, factors, hessian, settings)] if low_rank.merge else [*factors, base]


def _loss(difference: Tensor, groups: Tensor) -> float:
    """Returns the loss of a difference [R, C]; `groups` [G, C, C] has the Hessian of each of G equal runs of rows."""
    return sum(layer_loss(*pair) for pair in zip(difference.chunk(len(groups)), groups, strict=True))


def _losses(error: Tensor, groups: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Returns the losses that remain with the first 0, 1 ... k ranks of the factors, float64 [k + 1]."""
    down, up = down.to(error.device), up.to(error.device)
    rows = zip(error.chunk(len(groups)), groups, up.chunk(len(groups)), strict=True)
    return torch.stack([loss_by_rank(part, group, up_rows, down) for part, group, up_rows in rows]).sum(0)


def _facts(difference: Tensor, weight: Tensor, groups: Tensor) -> dict[str, float]:
    """Returns the facts of `solve_linear`, without the dampening, for weights that are off by `difference`."""
    loss, energy = _loss(difference, groups), max(_loss(weight, groups), 1e-30)
    share = float(difference.square().sum() / weight.square().sum().clamp_min(1e-30))
    return {"weight_error": share, "loss": loss, "relative_error": loss / energy}


def _merged(
    base: StoredTensor, weight: Tensor, factors: list[StoredTensor], hessian: Tensor, settings: SolverSettings
) -> StoredTensor:
    """Returns the corrected weights, quantized once more in the linear's codec.

    The loss that merging adds is the fact `loss` minus the last of the losses in the fact `correction`.
    """
    down, up = (values_of(factor) for factor in factors)
    corrected = (values_of(base) + up @ down).to(weight.device)
    again = solve_linear(base.name, corrected, hessian, base.codec_name, settings)
    groups = hessian.reshape(-1, weight.shape[1], weight.shape[1])
    facts = _facts(values_of(again).to(weight.device) - weight, weight, groups)
    return replace(again, facts=base.facts | facts)
