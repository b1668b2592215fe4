"""Chooses GPTQ's scales and zero points for a matrix, before any code is solved.

The search of `lqexport.grids.fit` gives a real-valued scale and offset. The file's offset is a whole number of scales,
the zero point. So the whole numbers below and above the real-valued zero point are tried, each with several scales that
are refitted. The zero point of a grid that spans the weights and 0 is tried, too, for groups that are far from 0.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from lqexport.formats.codec import ScaleFormat
from lqexport.formats.gptq import LEVELS, Gptq
from lqexport.grids.fit import CHUNK, normalized, search
from lqexport.grids.sections import ZeroSection, storable_scales

REFITS = 2
"""Least-squares refits of each scale that is tried."""
STRETCHES = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2)
"""Multiples of the search's scale that are tried: a grid that cannot be shifted freely needs another scale.

With more of them, or with all fifteen zero points, the error falls by less than 5 % (tests/test_gptq_format.py)."""
LAST = len(LEVELS) - 1
"""The largest code."""


def fit_zeros(codec: Gptq, weights: Tensor, importance: Tensor) -> ZeroSection:
    """Returns the fitted grid of `codec` for float32 weights [R, C] and importance [C], columns in stored order."""
    columns = weights.shape[1]
    group_importance = normalized(importance.unflatten(0, (-1, codec.group or columns)))
    levels = torch.from_numpy(LEVELS).to(weights.device)[None]
    if codec.symmetric:
        scale, _ = search(weights, group_importance, levels - codec.zero.low, True, None)
        return _section(codec, columns, scale, torch.full_like(scale, codec.zero.low))
    scale, offset = search(weights, group_importance, levels, True, ScaleFormat(codec.group))
    wanted = -offset / torch.where(scale == 0, torch.inf, scale)
    chunks = zip(*(rows.split(max(1, CHUNK // columns)) for rows in (weights, scale, wanted)), strict=True)
    fitted = [
        _whole(codec, rows.unflatten(1, group_importance.shape), group_importance, *starts) for rows, *starts in chunks
    ]
    return _section(codec, columns, torch.cat([scale for scale, _ in fitted]), torch.cat([zero for _, zero in fitted]))


def span_zeros(codec: Gptq, weights: Tensor) -> ZeroSection:
    """Returns the grid that spans the range of each group and 0, as GPTQ's quantizer does; columns in stored order."""
    columns = weights.shape[1]
    return _section(codec, columns, *_span(weights.unflatten(1, (-1, codec.group or columns)), codec.symmetric))


def _span(groups: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Returns the real-valued scale and zero point [R, G] that map the codes onto the range of each group and 0."""
    low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = (high - low) / LAST
    return scale, -low / torch.where(scale == 0, torch.inf, scale)


def _section(codec: Gptq, columns: int, scale: Tensor, zero: Tensor) -> ZeroSection:
    zeros = zero.round().clamp(codec.zero.low, codec.zero.high).to(torch.int16)
    return ZeroSection(columns, codec.zero, storable_scales(scale), zeros)


def _whole(codec: Gptq, groups: Tensor, importance: Tensor, scale: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the scale and the whole zero point [R, G] with the least weighted squared error of those that are tried.

    groups       [R, G, g]
    importance   [G, g], with sum 1 in each group
    scale        [R, G], of the search that knows no whole zero points
    wanted       [R, G], the real-valued zero point of that search
    """
    span, middle = _span(groups, False)
    starts = ((scale, wanted.floor()), (scale, wanted.ceil()), (span, middle.round()))
    least, best, chosen = torch.full_like(scale, torch.inf), scale, wanted
    for (start, whole), stretch in itertools.product(starts, STRETCHES):
        zero, refitted = whole.clamp(codec.zero.low, codec.zero.high), start * stretch
        for _ in range(REFITS):
            level = _levels(groups, refitted, zero)
            square = (importance * level.square()).sum(2)
            refitted = torch.where(square > 0, (importance * level * groups).sum(2) / square, refitted)
        value = refitted[..., None] * _levels(groups, refitted, zero)
        error = (importance * (groups - value).square()).sum(2)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, refitted, best)
        chosen = torch.where(better, zero, chosen)
    return best, chosen


def _levels(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Returns the level nearest to each weight [R, G, g], from -zero to 15 - zero."""
    step = torch.where(scale == 0, torch.inf, scale)[..., None]
    return (groups / step).round().maximum(-zero[..., None]).minimum(LAST - zero[..., None])
