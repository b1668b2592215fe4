"""The stage that shares bytes among the linears' low-rank corrections, and what the corrections gain.

Losses of different linears do not compare: only guided second moments say what an error does to the model's output.
With other moments the gain that counts is the loss that a correction takes away, relative to the energy of the linear's
output. Guided losses are in units of the end loss and count as they are.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from typing import Any

from lqexport.converters.factors import A, block_codec, corrected_linear, factor_names
from lqexport.converters.plan import PlannedTensor
from lqexport.formats.codec import Planes, nbytes
from lqexport.formats.registry import codec_named
from lqexport.pipeline.job import Job
from lqexport.recipe import Recipe
from lqexport.sizes import human_bytes
from lqexport.storage.artifact import Artifact, StoredTensor


@dataclass(frozen=True)
class Candidate:
    """A linear's correction, whose rank grows in steps.

    losses   the losses with 0, 1, 2 ... steps of rank
    nbytes   bytes of the factors for one step
    """

    losses: list[float]
    nbytes: int

    def gain(self, steps: int) -> float:
        """Returns the loss per byte that one more step after `steps` takes away; 0 if there is none."""
        return (self.losses[steps] - self.losses[steps + 1]) / self.nbytes if steps + 1 < len(self.losses) else 0.0


def allocate_steps(candidates: dict[str, Candidate], limit_bytes: int) -> dict[str, int]:
    """Returns steps of rank for each candidate, together at most `limit_bytes`.

    The step with the largest gain per byte that still fits comes first. Each linear's gains fall from step to step,
    since they are its squared singular values. So no other choice of as many bytes leaves less loss, except that steps
    of different sizes may fill the limit unevenly: that costs less than one step's gain.
    """
    chosen = dict.fromkeys(candidates, 0)
    queue = [(-candidate.gain(0), name) for name, candidate in candidates.items()]
    heapq.heapify(queue)
    while queue:
        negative_gain, name = heapq.heappop(queue)
        if negative_gain >= 0 or candidates[name].nbytes > limit_bytes:
            continue
        limit_bytes -= candidates[name].nbytes
        chosen[name] += 1
        heapq.heappush(queue, (-candidates[name].gain(chosen[name]), name))
    return chosen


def share_ranks(job: Job) -> dict[str, int]:
    """Cuts the stored corrections to ranks that fit into `recipe.factor_bytes`, and returns the ranks by linear.

    Rank 0 removes a correction. Without `factor_bytes` every linear keeps the recipe's rank; without a rank the result
    is empty. A second call, such as that of a run that was stopped in the first one, comes to the same ranks.
    """
    recipe, artifact = job.recipe, job.artifact
    if not recipe.rank:
        return {}
    if not recipe.factor_bytes:
        return dict.fromkeys(job.linears, recipe.rank)
    facts = {name: artifact.facts(name)["correction"] for name in job.linears}
    candidates = {name: _candidate(tensor, facts[name], recipe) for name, tensor in job.linears.items()}
    steps = allocate_steps(candidates, recipe.factor_bytes)
    ranks = {name: count * facts[name]["step"] for name, count in steps.items()}
    for name, tensor in job.linears.items():
        _cut_factors(artifact, tensor, ranks[name])
    return ranks


def _candidate(tensor: PlannedTensor, facts: dict[str, Any], recipe: Recipe) -> Candidate:
    scale = 1.0 if recipe.moments == "guided" else facts["energy"]
    codec, (rows, columns), step = codec_named(block_codec(recipe.factors, "factors")), tensor.matrix, facts["step"]
    step_bytes = nbytes(codec, step, columns) + nbytes(codec, rows, step)
    return Candidate([loss / scale for loss in facts["losses"]], step_bytes)


def _cut_factors(artifact: Artifact, tensor: PlannedTensor, rank: int) -> None:
    rows, columns = tensor.matrix
    for name, shape in zip(factor_names(tensor.name), ((rank, columns), (rows, rank)), strict=True):
        if not rank:
            artifact.remove(name)
        elif (stored := artifact.read(name)).shape != shape:
            artifact.write(cut(stored, shape))


def cut(tensor: StoredTensor, shape: tuple[int, int]) -> StoredTensor:
    """Returns the first rows and columns of a stored factor, `shape` of them: whole blocks, so no value changes."""
    layout = codec_named(tensor.codec_name).layout(*shape)
    planes: Planes = {name: tensor.planes[name][: size[0], : size[1]] for name, (_, size) in layout.items()}
    return replace(tensor, shape=shape, planes=planes)


def at_ranks(factors: list[PlannedTensor], ranks: dict[str, int]) -> list[PlannedTensor]:
    """Returns the plan of the factors that remain if each linear has the given rank."""
    remaining = []
    for tensor in factors:
        if rank := ranks[corrected_linear(tensor.name)]:
            rows, columns = tensor.matrix
            shape = (rank, columns) if tensor.name.endswith(A) else (rows, rank)
            remaining.append(replace(tensor, shape=shape))
    return remaining


def summary(
    entries: list[dict[str, Any]], base: list[PlannedTensor], factors: list[PlannedTensor], merged: bool
) -> dict[str, Any]:
    """Returns what the corrections cost and gain: bytes, and mean relative output errors of the linears.

    entries   the tensors of report.json
    merged    whether the corrections were merged into the linears

    The errors are `alone` (without factors), `corrected` (with them) and, if merged, `merged` (solved again).
    """
    corrected_entries = [entry for entry in entries if "correction" in entry]
    corrections = [entry["correction"] for entry in corrected_entries]
    errors = {
        "alone": [facts["losses"][0] / facts["energy"] for facts in corrections],
        "corrected": [facts["losses"][facts["rank"] // facts["step"]] / facts["energy"] for facts in corrections],
    }
    if merged:
        errors["merged"] = [entry["relative_error"] for entry in corrected_entries]
    sizes = {"base_bytes": sum(tensor.nbytes for tensor in base), "factor_bytes": sum(t.nbytes for t in factors)}
    return sizes | {name: sum(values) / len(values) for name, values in errors.items()}


def sentences(correction: dict[str, Any]) -> list[str]:
    """Returns what `summary` computed, in sentences for the terminal."""
    base, factors = human_bytes(correction["base_bytes"]), human_bytes(correction["factor_bytes"])
    errors = [f"{correction['alone']:.5f} alone"]
    if "merged" in correction:
        errors += [
            f"{correction['corrected']:.5f} corrected",
            f"{correction['merged']:.5f} merged and solved again ({base})",
        ]
    else:
        errors += [f"{correction['corrected']:.5f} with the factors ({base} and {factors})"]
    return [f"Mean relative output error of the linears on the calibration text: {', '.join(errors)}."]
