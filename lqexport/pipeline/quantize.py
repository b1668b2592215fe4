"""`quantize`: from a source to a finished artifact.

Types are chosen where the recipe leaves them open; each linear is solved under the second moments of its inputs, packed
and written; then the whole model is tuned end to end. Several processes share all but the tuning
(`lqexport.runtime.processes`).
"""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lqexport.converters.plan import PlannedTensor
from lqexport.errors import UserError, files_at_hand
from lqexport.models.source_grids import KEPT, moved
from lqexport.pipeline.allocate import Allocation
from lqexport.pipeline.exl2_mixes import choose_mixes
from lqexport.pipeline.job import Job
from lqexport.pipeline.ranks import at_ranks, share, summary
from lqexport.pipeline.solve_model import solve
from lqexport.pipeline.types_by_size import choose_types
from lqexport.planning.memory import MemoryLimits, available
from lqexport.recipe import Recipe
from lqexport.runtime.environment import choose_device, full_float32, peak_memory, steady_threads
from lqexport.runtime.processes import joined
from lqexport.runtime.progress import Listener, Silent
from lqexport.solver.linear import round_tensor
from lqexport.storage.artifact import SolvedModel, StoredTensor
from lqexport.storage.files import claimed
from lqexport.tuning.tune import HELD_OUT, Outcome, Tuner

OUT_OF_MEMORY = (
    "what is finished stays. `lqexport plan` says which stage takes how much; a smaller --device-memory keeps less on "
    "the device, and --prefix full, --tune 0 and shorter sequences need less."
)


@files_at_hand()
def quantize(
    recipe: Recipe, out: str | Path, *, device: str = "auto", cache: Path | None = None,
    listener: Listener | None = None, limits: MemoryLimits | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Quantize `recipe.source` into the artifact folder `out`, or finish what an interrupted run began there.

    cache    a folder that keeps second moments for other runs over the same source and calibration
    budget   the memory to fit into, where that can be had by keeping less at hand; None for what is free now

    Returns the report that is also written to report.json. Raises UserError for bad input.
    """
    steady_threads()
    full_float32()
    where = choose_device(device)
    with joined(where) as processes, torch.no_grad(), claimed(Path(out)) if processes.first else nullcontext():
        limits = (limits or available(where)).shared(processes.count)
        job = Job(recipe, Path(out), where, cache, listener or Silent(), processes, limits)
        if not processes.agreed(job.artifact.complete):
            try:
                _run(job)
            except torch.OutOfMemoryError as error:
                raise UserError(f"Out of memory on {where}: {OUT_OF_MEMORY}") from error
        if processes.first:  # of a finished artifact too: its run may have ended while this was going on
            shutil.rmtree(job.work, ignore_errors=True)
        return job.artifact.report()


def _run(job: Job) -> None:
    """All stages, from wherever an earlier run stopped."""
    limits, allocation = choose_types(job), choose_mixes(job)
    _round_others(job)
    solve(job)
    job.processes.wait()
    if job.processes.first:
        ranks = share(job.artifact, list(job.linears.values()), job.recipe) if job.recipe.rank else {}
        _finish(job, _Found(limits, allocation, ranks, _tune(job)))
    job.processes.wait()


@dataclass(frozen=True)
class _Found:
    """What the stages found out, for the report; None or empty where the recipe did not ask for it."""

    limits: dict[str, Any] | None
    allocation: Allocation | None
    ranks: dict[str, int]
    outcome: Outcome | None


def _round_others(job: Job) -> None:
    """Store what the solver does not work on."""
    others = [tensor for tensor in job.planned if not tensor.linear]
    job.listener.stage("Rounding embeddings and norms", sum(tensor.weights for tensor in others))
    for tensor in job.processes.mine(others):
        if tensor.name not in job.artifact:
            job.artifact.write_behind(_stored(job, tensor))
        job.listener.advance(tensor.weights * job.processes.count)
    job.artifact.settle()


def _stored(job: Job, tensor: PlannedTensor) -> StoredTensor:
    if tensor.source_grid == KEPT:
        return moved(job.source, tensor)
    return round_tensor(tensor.name, job.source.read(tensor.name).to(job.device), tensor.codec_name)


def _tune(job: Job) -> Outcome | None:
    """Tune the solved model end to end, where the recipe says so."""
    count = job.recipe.tuned_sequences
    if job.calibration is None or not count:
        return None
    solved = SolvedModel(job.artifact, job.source.config, [tensor.name for tensor in job.planned])
    tokens = torch.cat([job.calibration.tokens[:count], job.calibration.tokens[-HELD_OUT:]])
    models = job.model_of(solved), job.model()
    rate, placement = job.recipe.tune_rate, job.placement.unpacked
    outcome = Tuner(job.artifact, *models, tokens, rate, job.work, job.listener, placement).run()
    if not outcome.kept:
        job.listener.message("Tuning did not help on the held-out sequences: the model stays as it was solved.")
    return outcome


def _finish(job: Job, found: _Found) -> None:
    """Write the report and the manifest."""
    factors = at_ranks(job.factors, found.ranks)
    tensors = [_entry(job, tensor, found) for tensor in job.planned]
    report = {
        "run": job.identity(),
        "tensors": tensors,
        "bits_per_weight": _bits_per_weight(job.planned, factors),
    }
    if found.ranks:
        report["correction"] = summary(tensors, job.planned, factors, job.recipe.merge)
    if found.outcome:
        report["tuning"] = found.outcome.facts()
    if found.limits:
        report["budget"] = found.limits
    if job.recipe.bits is not None:
        report["linears_bits_per_weight"] = _bits_per_weight(list(job.linears.values()), [])
    if found.allocation:
        report["allocation"] = {"predicted": found.allocation.loss, "gap": found.allocation.gap}
    job.artifact.finish([tensor.name for tensor in (*job.planned, *factors)], report)
    job.artifact.log({"finished": True, "peak_memory_gib": round(peak_memory() / 2**30, 3)})


def _entry(job: Job, tensor: PlannedTensor, found: _Found) -> dict[str, Any]:
    """A tensor in the report."""
    entry: dict[str, Any] = {"name": tensor.name, "codec": tensor.codec_name, "shape": list(tensor.shape)}
    entry["bytes"] = tensor.nbytes
    if tensor.reason:
        entry |= {"wanted": tensor.wanted, "reason": tensor.reason}
    if tensor.source_grid:
        entry["source_grid"] = tensor.source_grid
    if found.allocation and tensor.name in found.allocation.chosen:
        entry["predicted"] = found.allocation.chosen[tensor.name].loss
    entry |= job.artifact.facts(tensor.name)
    if tensor.name in found.ranks:
        entry["correction"]["rank"] = found.ranks[tensor.name]
    return entry


def _bits_per_weight(planned: list[PlannedTensor], factors: list[PlannedTensor]) -> float:
    """Bytes of factors count, their numbers do not: they add nothing to the model's weights."""
    return 8 * sum(tensor.nbytes for tensor in (*planned, *factors)) / sum(tensor.weights for tensor in planned)
