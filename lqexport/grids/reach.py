"""The least and the greatest weight that the grids of a codec can reach."""

from __future__ import annotations

import numpy as np

from lqexport.formats.codec import GridCodec, ScaleFormat, SectionedCodec, TrellisCodec
from lqexport.formats.exl2 import Exl2
from lqexport.formats.gptq import LEVELS, MOST_SCALE, Gptq

ROTATED = 128.0
"""The largest weight that a rotated format is sure to hold: with scales as large as it, no sum overflows float16."""
HALF = float(np.finfo(np.float16).max)


def reach(codec: GridCodec | SectionedCodec | TrellisCodec) -> tuple[float, float]:
    """Returns the least and the greatest value that a grid fitted for `codec` can have.

    A weight beyond them is cut off, whatever scale its group gets. A group of weights that are all far above 0 could
    have a positive offset, too, which is not counted. A run of EXL2 with few bits may reach less.
    """
    if isinstance(codec, TrellisCodec):
        return -ROTATED, ROTATED
    if isinstance(codec, SectionedCodec):
        return _sectioned(codec)
    if codec.scale is None:
        return -HALF, HALF
    assert codec.levels is not None  # only a table per row has no levels and no scale
    if codec.rounding.by_steps:  # scale * level is rounded to the scale's type, and spans a group of either sign
        most = codec.scale.floats.most / 4
        return -most, most
    first, last, scale = float(codec.levels[0]), float(codec.levels[-1]), _largest(codec.scale)
    if codec.offset is not None:
        return scale * first - _largest(codec.offset), scale * last
    if codec.scale.floats.least >= 0:
        return scale * first, scale * last
    most = scale * max(-first, last)  # the scale may have either sign
    return -most, most


def _largest(format: ScaleFormat) -> float:
    """Returns the largest magnitude of a fitted scale or offset."""
    return format.floats.fitted.most * max(-format.low, format.high)


def _sectioned(codec: SectionedCodec) -> tuple[float, float]:
    if isinstance(codec, Gptq):
        return -codec.zero.high * MOST_SCALE, (float(LEVELS[-1]) - codec.zero.low) * MOST_SCALE
    assert isinstance(codec, Exl2)
    most = max(run.bits for run in codec.runs)
    return -HALF, HALF * (1 - 2.0 ** (1 - most))
