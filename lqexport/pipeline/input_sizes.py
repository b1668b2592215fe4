"""Measures how large the inputs of the linears are, once in a run: a stopped run reads them from its work folder."""

from __future__ import annotations

from torch import Tensor

from lqexport.calibration.collect import input_magnitudes
from lqexport.pipeline.job import Job
from lqexport.pipeline.kept_tensors import keep_tensors, kept_tensors


def input_sizes(job: Job, purpose: str, tokens: Tensor) -> dict[str, Tensor]:
    """Returns what `input_magnitudes` measures in the source as the job reads it: float32 [C] by the weight's name.

    purpose   names the file
    tokens    token ids [samples, length]
    """
    path = job.work_folder / f"input-sizes-{purpose}.safetensors"
    if job.processes.from_first(not path.is_file()):
        measured = input_magnitudes(
            job.model(), tokens, job.processes, listener=job.listener, description="Sizes of inputs"
        )
        if job.processes.first:
            keep_tensors(path, measured)
        job.processes.wait()
    return {name: sizes.to(job.device) for name, sizes in kept_tensors(path).items()}
