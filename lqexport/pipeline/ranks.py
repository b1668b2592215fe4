"""How much rank each linear's correction gets where all share a number of bytes, and what the corrections gain.

Losses of different linears do not compare: `--moments guided` aside, none says what an error does to the model's
output. So the gain that counts is the loss taken away relative to the energy of the linear's output; guided second
moments are in units of the end loss and count as they are.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from typing import Any

from lqexport.converters.factors import A, block_codec, corrected_linear, factor_names
from lqexport.converters.plan import PlannedTensor
from lqexport.formats.codec import Planes, nbytes
from lqexport.formats.registry import codec_named
from lqexport.recipe import Recipe
from lqexport.sizes import human_bytes
from lqexport.storage.artifact import Artifact, StoredTensor


@dataclass(frozen=True)
class Candidate:
    """A linear's correction: `losses` with 0, 1, 2 ... steps of rank, each step of `nbytes`."""

    losses: list[float]
    nbytes: int

    def gain(self, steps: int) -> float:
        """Loss per byte that the step after `steps` takes away."""
        return (self.losses[steps] - self.losses[steps + 1]) / self.nbytes if steps + 1 < len(self.losses) else 0.0


def allocate(candidates: dict[str, Candidate], limit_bytes: int) -> dict[str, int]:
    """Steps of rank for each candidate, together at most `limit_bytes` bytes.

    The step with the largest gain per byte that still fits comes first. Each linear's gains fall from step to step
    (they are its squared singular values), so no other choice of as many bytes leaves less loss, but for less than one
    step's gain where steps of different sizes fill the budget unevenly.
    """
    chosen = dict.fromkeys(candidates, 0)
    queue = [(-candidate.gain(0), name) for name, candidate in candidates.items()]
    heapq.heapify(queue)
    while queue:
        gain, name = heapq.heappop(queue)
        if gain >= 0 or candidates[name].nbytes > limit_bytes:
            continue
        limit_bytes -= candidates[name].nbytes
        chosen[name] += 1
        heapq.heappush(queue, (-candidates[name].gain(chosen[name]), name))
    return chosen


def share(artifact: Artifact, linears: list[PlannedTensor], recipe: Recipe) -> dict[str, int]:
    """Cut the stored corrections of solved linears to ranks that `recipe.factor_bytes` has room for; 0 removes one.

    Returns the ranks. A second call, such as that of a run that was stopped in the first, comes to the same.
    """
    facts = {tensor.name: artifact.facts(tensor.name)["correction"] for tensor in linears}
    if not recipe.factor_bytes:
        return dict.fromkeys(facts, recipe.rank)
    candidates = {tensor.name: _candidate(tensor, facts[tensor.name], recipe) for tensor in linears}
    steps = allocate(candidates, recipe.factor_bytes)
    ranks = {name: count * facts[name]["step"] for name, count in steps.items()}
    for tensor in linears:
        _cut_factors(artifact, tensor, ranks[tensor.name])
    return ranks


def _candidate(tensor: PlannedTensor, facts: dict[str, Any], recipe: Recipe) -> Candidate:
    scale = 1.0 if recipe.moments == "guided" else facts["energy"]
    kind, (rows, columns), step = codec_named(block_codec(recipe.factors, "factors")), tensor.matrix, facts["step"]
    size = nbytes(kind, step, columns) + nbytes(kind, rows, step)
    return Candidate([loss / scale for loss in facts["losses"]], size)


def _cut_factors(artifact: Artifact, tensor: PlannedTensor, rank: int) -> None:
    rows, columns = tensor.matrix
    for name, shape in zip(factor_names(tensor.name), ((rank, columns), (rows, rank)), strict=True):
        if not rank:
            artifact.remove(name)
        elif (stored := artifact.read(name)).shape != shape:
            artifact.write(cut(stored, shape))


def cut(tensor: StoredTensor, shape: tuple[int, int]) -> StoredTensor:
    """The first rows and columns of a stored factor, `shape` of them: whole blocks, so that no value changes."""
    layout = codec_named(tensor.codec_name).layout(*shape)
    planes: Planes = {name: tensor.planes[name][: size[0], : size[1]] for name, (_, size) in layout.items()}
    return replace(tensor, shape=shape, planes=planes)


def at_ranks(factors: list[PlannedTensor], ranks: dict[str, int]) -> list[PlannedTensor]:
    """The factors that are left where each linear has the given rank."""
    kept = []
    for tensor in factors:
        if rank := ranks[corrected_linear(tensor.name)]:
            rows, columns = tensor.matrix
            shape = (rank, columns) if tensor.name.endswith(A) else (rows, rank)
            kept.append(replace(tensor, shape=shape))
    return kept


def summary(
    entries: list[dict[str, Any]], base: list[PlannedTensor], factors: list[PlannedTensor], merged: bool
) -> dict[str, Any]:
    """What the corrections cost and gain: bytes, and the mean relative output error of the linears.

    entries   of report.json
    alone, corrected, merged   without factors; with them; where they were merged and the sum was solved again
    """
    solved = [entry for entry in entries if "correction" in entry]
    corrections = [entry["correction"] for entry in solved]
    errors = {
        "alone": [facts["losses"][0] / facts["energy"] for facts in corrections],
        "corrected": [facts["losses"][facts["rank"] // facts["step"]] / facts["energy"] for facts in corrections],
    }
    if merged:
        errors["merged"] = [entry["relative_error"] for entry in solved]
    sizes = {"base_bytes": sum(tensor.nbytes for tensor in base), "factor_bytes": sum(t.nbytes for t in factors)}
    return sizes | {name: sum(values) / len(values) for name, values in errors.items()}


def sentences(found: dict[str, Any]) -> list[str]:
    """What `summary` found, for the terminal."""
    base, factors = human_bytes(found["base_bytes"]), human_bytes(found["factor_bytes"])
    errors = [f"{found['alone']:.5f} alone"]
    if "merged" in found:
        errors += [f"{found['corrected']:.5f} corrected", f"{found['merged']:.5f} merged and solved again ({base})"]
    else:
        errors += [f"{found['corrected']:.5f} with the factors ({base} and {factors})"]
    return [f"Mean relative output error of the linears on the calibration text: {', '.join(errors)}."]
