"""A linear with its low-rank correction: solved in turn, the factors stored as tensors of their own."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lqexport.converters.factors import block_codec, factor_names
from lqexport.formats.registry import codec_named
from lqexport.recipe import Recipe
from lqexport.solver.feedback import layer_loss
from lqexport.solver.linear import round_tensor, solve_linear
from lqexport.solver.lowrank import column_weighting, correction, loss_by_rank
from lqexport.storage.artifact import Artifact, StoredTensor, values_of


def stored_correction(artifact: Artifact, name: str) -> Tensor | None:
    """B A of a linear, float32 [R, C], as the artifact's factors hold it; None where it has none."""
    down, up = factor_names(name)
    return values_of(artifact.read(up)) @ values_of(artifact.read(down)) if down in artifact else None


def solve_corrected(
    name: str, weight: Tensor, hessian: Tensor, magnitudes: Tensor | None, codec_name: str, recipe: Recipe
) -> list[StoredTensor]:
    """The factors A and B, then the linear itself, for float32 `weight` [R, C]; with `recipe.merge` the linear alone.

    hessian      second moments [C, C], or [G, C, C] for G equal runs of rows: the factors then take their mean
    magnitudes   for the scaling l2qer (see `lowrank.column_weighting`)

    Each of `recipe.rounds` solves the codes for the weights less the correction so far, then the correction for what
    those codes leave. Facts of the linear, besides those of `solve_linear`: `correction`, with the `energy` of the
    output and the `losses` that the stored factors leave, from none of them to all, in steps of `step` ranks.
    """
    groups = hessian.reshape(-1, weight.shape[1], weight.shape[1])
    weighting = column_weighting(recipe.scaling, groups.mean(0), magnitudes)
    target = weight
    for _ in range(recipe.rounds):
        base = solve_linear(name, target, hessian, codec_name, recipe)
        error = weight - values_of(base).to(weight.device)
        up, down = correction(error, weighting, recipe.rank)
        target = weight - up @ down
    kind = block_codec(recipe.factors, "factors")
    factors = [round_tensor(name, part, kind) for name, part in zip(factor_names(name), (down, up), strict=True)]
    losses = _losses(error, groups, *map(values_of, factors))
    facts = base.facts | _facts(error, weight, groups)
    step, energy = codec_named(kind).block, max(_loss(weight, groups), 1e-30)
    facts["correction"] = {"step": step, "losses": losses[::step].tolist(), "energy": energy}
    base = replace(base, facts=facts)
    return [_merged(base, weight, factors, hessian, recipe)] if recipe.merge else [*factors, base]


def _loss(difference: Tensor, groups: Tensor) -> float:
    """Loss of a difference [R, C], each of G equal runs of rows by its own second moments [G, C, C]."""
    return sum(layer_loss(*pair) for pair in zip(difference.chunk(len(groups)), groups, strict=True))


def _losses(error: Tensor, groups: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Losses with the first 0, 1 ... ranks of the factors."""
    down, up = down.to(error.device), up.to(error.device)
    rows = zip(error.chunk(len(groups)), groups, up.chunk(len(groups)), strict=True)
    return torch.stack([loss_by_rank(part, group, left, down) for part, group, left in rows]).sum(0)


def _facts(difference: Tensor, weight: Tensor, groups: Tensor) -> dict[str, float]:
    """What `solve_linear` records, of another solution."""
    loss, energy = _loss(difference, groups), max(_loss(weight, groups), 1e-30)
    share = float(difference.square().sum() / weight.square().sum().clamp_min(1e-30))
    return {"weight_error": share, "loss": loss, "relative_error": loss / energy}


def _merged(
    base: StoredTensor, weight: Tensor, factors: list[StoredTensor], hessian: Tensor, recipe: Recipe
) -> StoredTensor:
    """The corrected weights solved into the format again; what that costs is the difference of the facts' losses."""
    down, up = (values_of(factor) for factor in factors)
    corrected = (values_of(base) + up @ down).to(weight.device)
    again = solve_linear(base.name, corrected, hessian, base.codec_name, recipe)
    groups = hessian.reshape(-1, weight.shape[1], weight.shape[1])
    facts = _facts(values_of(again).to(weight.device) - weight, weight, groups)
    return replace(again, facts=base.facts | facts)
