"""The last stage: writes report.json and the manifest, which says that the artifact is whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lqexport.converters.counting import copied_output, counted, counted_linears
from lqexport.converters.models.architectures import architecture_of
from lqexport.converters.plan import PlannedTensor
from lqexport.pipeline.allocate import Allocation
from lqexport.pipeline.job import Job
from lqexport.pipeline.ranks import at_ranks, summary
from lqexport.runtime.environment import peak_memory
from lqexport.tuning.tune import Outcome


@dataclass(frozen=True)
class Results:
    """Results of the stages for the report; None or empty if the recipe did not ask for them.

    type_choice   the types chosen for a size, as budget.json holds them
    allocation    the widths chosen for EXL2 and EXL3
    ranks         the rank of each linear's low-rank correction
    tuning        the outcome of end-to-end tuning
    """

    type_choice: dict[str, Any] | None
    allocation: Allocation | None
    ranks: dict[str, int]
    tuning: Outcome | None


def finish(job: Job, results: Results) -> None:
    """Writes the report and the manifest."""
    factors = at_ranks(job.factors, results.ranks)
    tensors = [_entry(job, tensor, results) for tensor in job.planned]
    stored, config = [*job.planned, *factors], job.source.config
    count = counted(stored, copied_output(config))
    report = {"run": job.identity, "tensors": tensors, "bits_per_weight": count.bits_per_weight}
    if results.ranks:
        report["correction"] = summary(tensors, job.planned, factors, job.recipe.merge)
    if results.tuning:
        report["tuning"] = results.tuning.facts()
    if results.type_choice:
        report["budget"] = results.type_choice
    if job.recipe.bits is not None:
        report["linears_bits_per_weight"] = counted_linears(stored, architecture_of(config)).bits_per_weight
    if results.allocation:
        report["allocation"] = {"predicted": results.allocation.loss, "gap": results.allocation.gap}
    job.listener.stage("Write digests of all tensors", 0)
    job.artifact.finish([tensor.name for tensor in stored], report)
    job.artifact.log({"finished": True, "peak_memory_gib": round(peak_memory() / 2**30, 3)})


def _entry(job: Job, tensor: PlannedTensor, results: Results) -> dict[str, Any]:
    """Returns what the report says of a tensor."""
    entry: dict[str, Any] = {"name": tensor.name, "codec": tensor.codec_name, "shape": list(tensor.shape)}
    entry["bytes"] = tensor.nbytes
    if tensor.reason:
        entry |= {"wanted": tensor.wanted, "reason": tensor.reason}
    if tensor.source_grid:
        entry["source_grid"] = tensor.source_grid
    if results.allocation and tensor.name in results.allocation.chosen:
        entry["predicted"] = results.allocation.chosen[tensor.name].loss
    entry |= job.artifact.facts(tensor.name)
    if tensor.name in results.ranks:
        entry["correction"]["rank"] = results.ranks[tensor.name]
    return entry
