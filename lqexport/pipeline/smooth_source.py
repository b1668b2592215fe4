"""The stage that smooths the source, so that llama.cpp rounds the inputs of linears better."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import Config
from lqexport.converters.models.architectures import architecture_of
from lqexport.converters.plan import PlannedTensor
from lqexport.models.smoothing import SEQUENCES, Pair, Smoothed, column_scales, pairs
from lqexport.models.source_grids import KEPT
from lqexport.pipeline.input_sizes import input_sizes
from lqexport.pipeline.job import Job
from lqexport.recipe import Recipe


def smooth_source(job: Job) -> Job:
    """Returns the job with a smoothed source, if the recipe asks for it and the run calibrates."""
    solved_pairs = pairs_to_smooth(job.recipe, job.source.config, job.planned) if job.calibration else []
    if not solved_pairs:
        return job
    sizes = input_sizes(job, "smoothing", job.sequences[:SEQUENCES])
    scales = {pair: column_scales(sizes[pair.takers[0]]) for pair in solved_pairs}
    return replace(job, source=Smoothed(job.source, scales))


def pairs_to_smooth(recipe: Recipe, config: Config, planned: list[PlannedTensor]) -> list[Pair]:
    """Returns the pairs that a run which calibrates smooths; none if the recipe does not ask for it.

    Only norms and linears that feed solved linears alone are smoothed. Nothing is if the source's own grids are kept.
    """
    if not recipe.smooth or any(tensor.source_grid == KEPT for tensor in planned):
        return []
    solved = {tensor.name for tensor in planned if tensor.linear}
    every_pair = pairs(architecture_of(config), int(config["num_hidden_layers"]))
    return [pair for pair in every_pair if solved.issuperset(pair.takers)]
