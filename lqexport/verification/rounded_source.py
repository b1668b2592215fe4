"""The source's own weights, rounded to nearest in the types that a written file stores them in."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lqexport.converters.models.architectures import architecture_of
from lqexport.grids.rounding import rounded_like
from lqexport.models.interface import Weights
from lqexport.models.smoothing import Pair, Smoothed
from lqexport.models.source import Source
from lqexport.models.written import Export
from lqexport.verification.deviation import deviation
from lqexport.verification.verify_tensors import relative_error

CONTRADICTION = 0.5
"""Scales are dropped if a linear's error without them is below this share of its error with them."""

TOO_COARSE = 0.5
"""Scales are dropped if the giver's relative squared error with them is above this: its rows' sizes say nothing then.

llama.cpp's ternary types leave 0.65 of normal weights' squares."""


class RoundedSource:
    """A source whose tensors are rounded as they are read, each to the type of the file's tensor of that name.

    The config is the source's. A file that holds an output layer of its own where the source's is tied gets one here.

    errors      name -> relative squared error of each tensor that has been read
    deviations  name -> how the file's tensor differs from the source's as no quantizer leaves it (`deviation`)
    """

    def __init__(self, source: Weights, export: Export) -> None:
        self._source, self._export, self.config = source, export, source.config
        self._own, self._architecture = set(source.names()), architecture_of(source.config)
        added = self._architecture.output
        self.errors: dict[str, float] = {}
        self.deviations: dict[str, str] = {}
        self._added = [added] if added not in self._own and added in export.names() else []

    def names(self) -> list[str]:
        return [*self._source.names(), *self._added]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._original(name))

    def read(self, name: str) -> Tensor:
        """Returns one tensor, rounded, float32. Raises ValueError if the file's type cannot hold it."""
        values = self._source.read(self._original(name))
        codec_name, planes, _ = self._export.planes(name)
        matrix = values.reshape(1, -1) if values.ndim == 1 else values
        rounded = rounded_like(codec_name, planes, matrix).reshape(values.shape)
        if name not in self.errors:
            self.errors[name] = relative_error(rounded.numpy(), values)
            if sentence := deviation(self._export.read(name).float(), rounded, values.float()):
                self.deviations[name] = sentence
        return rounded

    def _original(self, name: str) -> str:
        return name if name in self._own else self._architecture.embedding


def not_contradicted(source: Source, export: Export, scales: Mapping[Pair, Tensor]) -> dict[Pair, Tensor]:
    """Returns the scales of smoothing that the linears behind the norms do not contradict.

    Scales are found by the givers alone (`scales_between`), so wrong ones look like smoothing. A pair is dropped if its
    first linear is much nearer to the source's without the scales, or if its giver is rounded too coarsely to tell.
    """
    everything, shapes = Smoothed(source, scales), {name: export.shape(name) for name in export.names()}
    kept = {}
    for pair, scale in scales.items():
        without = Smoothed(source, {other: value for other, value in scales.items() if other is not pair})
        taker, giver = pair.takers[0], f"{pair.giver}.weight"
        if relative_error(export.read(giver).numpy(), everything.read(giver)) > TOO_COARSE:
            continue
        if shapes.get(taker) == source.shape(taker):
            values = export.read(taker).numpy()
            with_scales, alone = (relative_error(values, model.read(taker)) for model in (everything, without))
            if alone > CONTRADICTION * with_scales:
                kept[pair] = scale
    return kept
