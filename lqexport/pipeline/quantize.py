"""`quantize`: the stages from a source to a finished artifact.

Several processes share all stages but tuning (`lqexport.runtime.processes`). Each stage goes on from where a stopped
run was, and ends in the same bytes.
"""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from lqexport.errors import UserError, files_at_hand
from lqexport.pipeline.choose_bits import choose_bits
from lqexport.pipeline.job import Job
from lqexport.pipeline.prepare import prepare
from lqexport.pipeline.ranks import share_ranks
from lqexport.pipeline.round_others import round_others
from lqexport.pipeline.run_report import Results, finish
from lqexport.pipeline.smooth_source import smooth_source
from lqexport.pipeline.solve_model import solve_model
from lqexport.pipeline.tune_model import tune_model
from lqexport.pipeline.types_by_size import choose_types
from lqexport.planning.memory import MemoryLimits, available
from lqexport.recipe import Recipe
from lqexport.runtime.environment import choose_device, full_float32, steady_threads
from lqexport.runtime.processes import joined
from lqexport.runtime.progress import Listener, Silent
from lqexport.runtime.shown import ShownDict
from lqexport.storage.files import claimed

OUT_OF_MEMORY = (
    "what is finished stays. `lqexport plan` says which stage takes how much; a smaller --device-memory keeps less on "
    "the device, and --prefix full, --tune 0 and shorter sequences need less."
)


@files_at_hand()
def quantize(
    recipe: Recipe, out: str | Path, *, device: str = "auto", cache: str | Path | None = None,
    listener: Listener | None = None, limits: MemoryLimits | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Quantize `recipe.source` into the artifact folder `out`, or finish what a stopped run began there.

    device     auto, cpu, cuda or cuda:1
    cache      a folder that keeps second moments for other runs over the same source and calibration
    listener   is told of the progress
    limits     the memory to fit into, if that is possible by keeping less at hand; None for what is free now

    Returns the report that is also written to report.json. Raises UserError for bad input.
    """
    steady_threads()
    full_float32()
    chosen_device = choose_device(device)
    with joined(chosen_device) as processes, torch.no_grad(), claimed(Path(out)) if processes.first else nullcontext():
        job = prepare(
            recipe, Path(out), Path(cache) if cache else None, device=chosen_device, processes=processes,
            listener=listener or Silent(), limits=(limits or available(chosen_device)).shared(processes.count),
        )  # fmt: skip
        if not processes.from_first(job.artifact.complete):
            try:
                _run_stages(job)
            except torch.OutOfMemoryError as error:
                raise UserError(f"Out of memory on {chosen_device}: {OUT_OF_MEMORY}") from error
        if processes.first:  # also for a finished artifact: its run may have been stopped before this line
            shutil.rmtree(job.work_folder, ignore_errors=True)
        return ShownDict(job.artifact.report())


def _run_stages(job: Job) -> None:
    """Runs all stages from wherever an earlier run stopped."""
    job = smooth_source(job)
    job, type_choice = choose_types(job)
    job, allocation = choose_bits(job)
    round_others(job)
    solve_model(job)
    job.processes.wait()
    if job.processes.first:
        ranks = share_ranks(job)
        tuning = tune_model(job)
        finish(job, Results(type_choice, allocation, ranks, tuning))
    job.processes.wait()
