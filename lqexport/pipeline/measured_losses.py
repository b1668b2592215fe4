"""Predicted losses of the options of tensors: measured once for all sizes, and kept beside the second moments."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict
from functools import partial
from pathlib import Path

from torch import Tensor

from lqexport.calibration.collect import begin_with_first, by_weight
from lqexport.formats.codec import nbytes
from lqexport.formats.registry import codec_named
from lqexport.pipeline.allocate import Option
from lqexport.pipeline.job import Job
from lqexport.pipeline.second_moments import block_moments
from lqexport.runtime.environment import versions
from lqexport.storage.files import json_bytes, optional_json, read_json, written_whole

Losses = dict[str, dict[str, float]]
"""Tensor name to codec name to predicted loss."""

MEASURED_BY = ("method", "moments", "dampening", "importance", "exponent", "act_order")
"""Options of a recipe that decide a predicted loss, besides those that decide the second moments."""

SAMPLED_ROWS = 256
"""Rows of a linear on which its options are measured."""


class MeasuredLosses:
    """The losses measured so far, in a folder with one file a tensor, so that several processes and runs may write."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def losses(self) -> Losses:
        """Returns all losses that any process or run has measured. Raises UserError if a file is damaged."""
        return {path.stem: read_json(path, f"{path} is gone.") for path in self._folder.glob("[!.]*.json")}

    def add(self, name: str, losses: dict[str, float]) -> None:
        """Keeps losses of a tensor, beside those of other codecs that another run may have added meanwhile."""
        path = self._folder / f"{name}.json"
        with written_whole(path, wait=True) as file:  # nobody adds anything between reading and writing
            file.write(json_bytes(optional_json(path) | losses))


def measured_losses(job: Job, options: str) -> MeasuredLosses:
    """Returns the losses under the job's second moments and solver; `options` names what is measured, such as types."""
    assert job.moments_cache is not None
    facts = {key: value for key, value in asdict(job.recipe).items() if key in MEASURED_BY}
    return MeasuredLosses(job.moments_cache.measured(options, facts | {"versions": versions("numpy", "numba")}))


def measure_linears(
    job: Job, measured: MeasuredLosses, names: Collection[str], stage: str,
    losses_of: Callable[[str, Tensor, Tensor], dict[str, float]],
) -> None:  # fmt: skip
    """Measures and keeps the losses of the named linears, block by block as their second moments come.

    losses_of   takes a name, the float32 weight [R, C] and the second moments as `SecondMoments.hessian` gives them,
                both on the device
    """
    model = job.model()
    for block in begin_with_first(block_moments(job, model), partial(job.listener.stage, stage, len(names))):
        hessians = by_weight(model, block)
        for name in sorted(hessians.keys() & set(names)):
            weight = job.source.read(name).to(job.device).float()
            measured.add(name, losses_of(name, weight, hessians[name].to(job.device)))
            job.listener.advance(job.processes.count)


def sampled_rows(weight: Tensor, count: int = SAMPLED_ROWS) -> Tensor:
    """Returns about `count` rows of a weight [R, C], evenly spread; all if it has fewer."""
    return weight[:: max(1, len(weight) // count)].contiguous()


def options(losses: dict[str, float], shape: tuple[int, int]) -> list[Option]:
    """Returns the options of a tensor of shape [rows, columns], from the losses of its codecs."""
    return [Option(name, nbytes(codec_named(name), *shape), loss) for name, loss in losses.items()]
