"""The stage that tunes the solved model end to end."""

from __future__ import annotations

import torch

from lqexport.pipeline.job import Job
from lqexport.storage.artifact import SolvedModel
from lqexport.tuning.tune import HELD_OUT, Outcome, Tuner


def tune_model(job: Job) -> Outcome | None:
    """Tunes what the artifact stores as floating-point numbers; returns None if the recipe asks for no tuning."""
    count = job.recipe.tuned_sequences
    if job.calibration is None or not count:
        return None
    solved = SolvedModel(job.artifact, job.source.config, [tensor.name for tensor in job.planned])
    tokens = torch.cat([job.calibration.tokens[:count], job.calibration.tokens[-HELD_OUT:]])
    outcome = Tuner(
        job.artifact, job.model_of(solved), job.model(), tokens, rate=job.recipe.tune_rate, folder=job.work_folder,
        listener=job.listener, cache_bytes=job.placement.unpacked,
    ).run()  # fmt: skip
    if not outcome.kept:
        job.listener.message("Tuning did not help on the held-out sequences: the model stays as it was solved.")
    return outcome
