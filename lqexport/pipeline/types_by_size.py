"""A byte budget: the type of every tensor, chosen so that the whole model loses least at a given size.

What each tensor costs in each type is measured once. Rows of a linear are solved (error feedback, no descent) under its
guided second moments, whose loss estimates nats per token of the model (`lqexport.calibration.moments`). The embedding and the
output are rounded, and the model's own KL divergence is measured with that tensor alone replaced. The costs are added
up, and `lqexport.pipeline.allocate` finds the choice of least sum within the budget.
"""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from lqexport.calibration.collect import final_states
from lqexport.converters.plan import PlannedTensor
from lqexport.errors import AGAIN, well_formed
from lqexport.models.blocks import BlockModel
from lqexport.models.interface import Weights
from lqexport.pipeline import measured_losses as measured
from lqexport.pipeline.allocate import allocate, reachable
from lqexport.pipeline.job import Job
from lqexport.pipeline.measured_losses import Losses, Measured
from lqexport.planning.recipe_plan import plan_recipe
from lqexport.recipe import Recipe
from lqexport.runtime.progress import Listener
from lqexport.sizes import model_size
from lqexport.solver.linear import round_tensor, solve_linear
from lqexport.storage.artifact import StoredTensor, decoded
from lqexport.storage.files import read_json, write_json

SUPERBLOCKS = ("gguf:Q2_K", "gguf:Q3_K", "gguf:Q4_K", "gguf:Q5_K", "gguf:Q6_K", "gguf:Q8_0")
BLOCKS = ("gguf:Q4_0", "gguf:Q4_1", "gguf:Q5_0", "gguf:Q5_1", "gguf:Q8_0")
"""The types to choose from, where 256 divides the columns and where only 32 does. Others of equal bytes lose more."""
OUTER = ("gguf:Q4_K", "gguf:Q5_K", "gguf:Q6_K", "gguf:Q8_0")
"""Those for the embedding and the output."""

CURVE_POINTS = 16

SAMPLED_ROWS = 256
"""Rows of a linear, evenly spread, on which its types are measured."""
SEQUENCES = 4
"""Calibration sequences on which the embedding and the output are measured."""


def choose_types(job: Job) -> dict[str, Any] | None:
    """Where the recipe gives a size: measure every tensor in every type, and plan the job anew with the best choice,
    which is returned as budget.json keeps it."""
    if job.recipe.size is None:
        return None
    path = job.artifact.folder / "budget.json"
    if job.processes.agreed(not path.is_file()):
        choice = _measured_choice(job, job.recipe.size)
        if job.processes.first:
            write_json(path, choice)
        job.processes.wait()
    budget: dict[str, Any] = read_json(path, f"{path} is gone.")
    with well_formed(path, AGAIN):
        job.take_plan(plan_recipe(job.source, job.recipe, budget["chosen"]))
    return budget


def _measured_choice(job: Job, wanted: str) -> dict[str, Any]:
    def bytes_of(target: str) -> int:
        same = dataclasses.replace(job.recipe, target=target, size=None, types=[])
        return sum(tensor.nbytes for tensor in plan_recipe(job.source, same))

    limit = model_size(wanted, sum(tensor.weights for tensor in job.planned), bytes_of)
    free = {tensor.name: options(tensor) for tensor in job.planned if not _has_fixed_type(tensor, job.recipe)}
    kept = job.measured("types")
    known = kept.losses()
    missing = job.processes.agreed([name for name in free if name not in known])
    if linears := [name for name in missing if name in job.linears]:

        def losses_of(name: str, weight: Tensor, hessian: Tensor) -> dict[str, float]:
            return type_losses(name, weight, hessian, free[name], job.recipe)

        measured.measure_linears(job, kept, linears, "Measuring types", losses_of)
    outer = {name: free[name] for name in job.processes.mine([name for name in missing if name not in job.linears])}
    job.listener.stage("Measuring embedding and output", len(outer))
    measure_outer(job.source, outer, job.sequences, job.device, kept, job.listener)
    job.processes.wait()
    losses = kept.losses()
    return found(job.planned, {name: losses[name] for name in free}, limit)


def _has_fixed_type(tensor: PlannedTensor, recipe: Recipe) -> bool:
    by_hand = any(fnmatchcase(tensor.name, pattern) for pattern in recipe.chosen_types())
    return by_hand or len(options(tensor)) == 1


def options(tensor: PlannedTensor) -> tuple[str, ...]:
    """Codecs that may hold a tensor; its own alone where there is nothing to choose."""
    if len(tensor.shape) == 1:
        return (tensor.codec_name,)
    columns = tensor.shape[1]
    if columns % 32:
        return (tensor.codec_name,)
    if columns % 256:
        return BLOCKS if tensor.linear else ("gguf:Q8_0",)
    return SUPERBLOCKS if tensor.linear else OUTER


def type_losses(name: str, weight: Tensor, hessian: Tensor, kinds: tuple[str, ...], recipe: Recipe) -> dict[str, float]:
    """The predicted loss of a linear in each codec: float32 weight [R, C], guided second moments [C, C] or, of each of
    G output groups, [G, C, C]."""
    quick = dataclasses.replace(recipe, descent=0)
    sample = weight[:: max(1, len(weight) // SAMPLED_ROWS)].contiguous()
    hessian = hessian.reshape(-1, weight.shape[1], weight.shape[1]).mean(0)
    solved = {kind: solve_linear(name, sample, hessian, kind, quick) for kind in kinds}
    per_loss = 0.5 * len(weight) / len(sample)
    return {kind: per_loss * tensor.facts["loss"] for kind, tensor in solved.items()}


class _Replaced:
    """A model with one tensor replaced."""

    def __init__(self, weights: Weights, tensor: StoredTensor) -> None:
        self._weights, self._tensor = weights, tensor
        self.config = weights.config

    def names(self) -> list[str]:
        return self._weights.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights.shape(name)

    def read(self, name: str) -> Tensor:
        return torch.from_numpy(decoded(self._tensor)) if name == self._tensor.name else self._weights.read(name)


def measure_outer(
    source: Weights, outer: dict[str, tuple[str, ...]], tokens: Tensor, device: torch.device, kept: Measured,
    listener: Listener,
) -> None:  # fmt: skip
    """Mean KL when an embedding or output (name -> codecs) alone is rounded to each codec, on a few sequences."""
    if not outer:
        return
    original, tokens = BlockModel(source, device), tokens[:SEQUENCES]
    states = final_states(original, tokens)
    for name, kinds in outer.items():
        losses = {}
        for kind in kinds:
            changed = BlockModel(_Replaced(source, round_tensor(name, source.read(name), kind)), device)
            # An output of its own comes after the states.
            own = states if name == original.architecture.output else final_states(changed, tokens)
            pairs = zip(states, own, strict=True)
            divergences = [_kl(original.logits(p.to(device)), changed.logits(q.to(device))) for p, q in pairs]
            losses[kind] = max(0.0, sum(divergences) / len(divergences))
        kept.add(name, losses)
        listener.advance(1)


def _kl(theirs: Tensor, ours: Tensor) -> float:
    p, q = log_softmax(theirs.double(), -1), log_softmax(ours.double(), -1)
    return float(kl_div(q, p, reduction="batchmean", log_target=True))


def found(planned: list[PlannedTensor], losses: Losses, limit: int) -> dict[str, Any]:
    """The best choice within `limit` bytes, as JSON values, with all losses and the curve of loss over bytes.

    Raises UserError where no choice fits, with the reachable sizes."""
    # A tensor that was not measured keeps the codec of its plan.
    known = {tensor.name: losses.get(tensor.name, {tensor.codec_name: 0.0}) for tensor in planned}
    tensors = {tensor.name: measured.options(known[tensor.name], tensor.matrix) for tensor in planned}
    best = allocate(tensors, limit)
    least, most = reachable(tensors)
    sizes = [least + (most - least) * i // (CURVE_POINTS - 1) for i in range(CURVE_POINTS)]
    return {
        "limit_bytes": limit,
        "tensor_bytes": best.nbytes,
        "predicted_kl": best.loss,
        "predicted_kl_gap": best.gap,
        "chosen": {name: option.name for name, option in best.chosen.items() if name in losses},
        "losses": losses,
        "curve": [{"bytes": size, "loss": allocate(tensors, size).loss} for size in sizes],
    }
