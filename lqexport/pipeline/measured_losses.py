"""What the options of tensors are predicted to cost: measured once, for every size, beside the second moments."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from lqexport.calibration.collect import begin_with_first, by_weight
from lqexport.formats.codec import nbytes
from lqexport.formats.registry import codec_named
from lqexport.pipeline.allocate import Option
from lqexport.storage.files import read_json, write_json

if TYPE_CHECKING:
    from lqexport.pipeline.job import Job

Losses = dict[str, dict[str, float]]
"""Tensor -> codec -> predicted loss."""


class Measured:
    """Losses found so far, kept on disk, each tensor's in a file of its own: several processes may write, and runs that
    measure different tensors."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def losses(self) -> Losses:
        """All of them, whoever found them."""
        return {path.stem: read_json(path, f"{path} is gone.") for path in self._folder.glob("*.json")}

    def add(self, name: str, losses: dict[str, float]) -> None:
        """Keep those of one more tensor."""
        write_json(self._folder / f"{name}.json", losses)


def measure_linears(
    job: Job, kept: Measured, names: Collection[str], stage: str,
    losses_of: Callable[[str, Tensor, Tensor], dict[str, float]],
) -> None:  # fmt: skip
    """Keep the losses of these linears as their blocks' second moments come: `losses_of` takes a name, the float32
    weight [R, C] and the second moments as `SecondMoments.hessian` gives them, both on the device."""
    model = job.model()
    for block in begin_with_first(job.moments(model), partial(job.listener.stage, stage, len(names))):
        hessians = by_weight(model, block)
        for name in sorted(hessians.keys() & set(names)):
            weight = job.source.read(name).to(job.device).float()
            kept.add(name, losses_of(name, weight, hessians[name].to(job.device)))
            job.listener.advance(job.processes.count)


def options(losses: dict[str, float], shape: tuple[int, int]) -> list[Option]:
    """The options of a tensor of shape [rows, columns], from the losses of its codecs."""
    return [Option(kind, nbytes(codec_named(kind), *shape), loss) for kind, loss in losses.items()]
