"""The stage that stores what the solver does not work on: embeddings, norms, weights that keep the source's grid."""

from __future__ import annotations

from lqexport.converters.plan import PlannedTensor
from lqexport.models.source_grids import KEPT, moved
from lqexport.pipeline.job import Job
from lqexport.solver.rounded_tensor import round_tensor
from lqexport.storage.artifact import StoredTensor


def round_others(job: Job) -> None:
    """Rounds and writes every tensor that the solver does not work on. Several processes write different ones."""
    others = [tensor for tensor in job.planned if not tensor.linear]
    job.listener.stage("Rounding embeddings and norms", sum(tensor.weights for tensor in others))
    for tensor in job.processes.share_of(others):
        if tensor.name not in job.artifact:
            job.artifact.write_behind(_stored(job, tensor))
        job.listener.advance(tensor.weights * job.processes.count)
    job.artifact.settle()


def _stored(job: Job, tensor: PlannedTensor) -> StoredTensor:
    if tensor.source_grid == KEPT:
        return moved(job.source, tensor)
    return round_tensor(tensor.name, job.source.read(tensor.name).to(job.device), tensor.codec_name)
