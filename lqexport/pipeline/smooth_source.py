"""The stage that smooths the source, so that llama.cpp rounds the inputs of linears better."""

from __future__ import annotations

from dataclasses import replace

from lqexport.calibration.collect import input_magnitudes
from lqexport.models.smoothing import SEQUENCES, Smoothed, column_scales, pairs
from lqexport.models.source_grids import KEPT
from lqexport.pipeline.job import Job


def smooth_source(job: Job) -> Job:
    """Returns the job with a smoothed source, if the recipe asks for it.

    Only norms and linears that feed solved linears alone are smoothed. Nothing is if the source's own grids are kept.
    """
    if not job.recipe.smooth or job.calibration is None:
        return job
    if any(tensor.source_grid == KEPT for tensor in job.planned):
        return job
    every_pair = pairs(job.architecture, int(job.source.config["num_hidden_layers"]))
    solved_pairs = [pair for pair in every_pair if all(name in job.linears for name in pair.takers)]
    if not solved_pairs:
        return job
    magnitudes = input_magnitudes(
        job.model(), job.sequences[:SEQUENCES], job.processes, listener=job.listener, description="Sizes of inputs"
    )
    scales = {pair: column_scales(magnitudes[pair.takers[0]]) for pair in solved_pairs}
    return replace(job, source=Smoothed(job.source, scales))
