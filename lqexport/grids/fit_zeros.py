"""Choosing GPTQ's scales and zero points for a matrix, before any code is solved.

The search of `lqexport.grids.fit` gives a real-valued scale and offset. The file's offset is a whole number of scales, so
both neighbours of what was found are tried as zero points, each under some scales that are refitted; and so is the zero
point of a grid that spans the weights and 0, for groups that are far from 0.
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
STRETCHES = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2)
"""Times the scale that was found: a grid that may not be shifted freely wants another. With more of them, or with all
fifteen zero points, the error falls by less than 5 % (tests/test_gptq_format.py)."""
LAST = len(LEVELS) - 1


def fit_zeros(codec: Gptq, weights: Tensor, importance: Tensor) -> ZeroSection:
    """The grid of `codec` for float32 weights [R, C] and importance [C], columns in the order in which groups take
    them."""
    columns = weights.shape[1]
    weight = normalized(importance.unflatten(0, (-1, codec.group or columns)))
    levels = torch.from_numpy(LEVELS).to(weights.device)[None]
    if codec.symmetric:
        scale, _ = search(weights, weight, levels - codec.zero.low, True, None)
        return _section(codec, columns, scale, torch.full_like(scale, codec.zero.low))
    scale, offset = search(weights, weight, levels, True, ScaleFormat(codec.group))
    wanted = -offset / torch.where(scale == 0, torch.inf, scale)
    chunks = zip(*(part.split(max(1, CHUNK // columns)) for part in (weights, scale, wanted)), strict=True)
    parts = [_whole(codec, part.unflatten(1, weight.shape), weight, *found) for part, *found in chunks]
    return _section(codec, columns, torch.cat([scale for scale, _ in parts]), torch.cat([zero for _, zero in parts]))


def span_zeros(codec: Gptq, weights: Tensor) -> ZeroSection:
    """The grid that spans the range of each group and 0, as GPTQ's own quantizer takes it."""
    columns = weights.shape[1]
    return _section(codec, columns, *_span(weights.unflatten(1, (-1, codec.group or columns)), codec.symmetric))


def _span(groups: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point [R, G], as real numbers, that map the codes onto the range of each group and 0."""
    low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = (high - low) / LAST
    return scale, -low / torch.where(scale == 0, torch.inf, scale)


def _section(codec: Gptq, columns: int, scale: Tensor, zero: Tensor) -> ZeroSection:
    zeros = zero.round().clamp(codec.zero.low, codec.zero.high).to(torch.int16)
    return ZeroSection(columns, codec.zero, storable_scales(scale), zeros)


def _whole(codec: Gptq, groups: Tensor, weight: Tensor, scale: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and whole zero point [R, G] of least weighted squared error, for groups [R, G, g] and weight [G, g]; tried
    around those that were found without the zero point being whole."""
    span, middle = _span(groups, False)
    starts = ((scale, wanted.floor()), (scale, wanted.ceil()), (span, middle.round()))
    least, best, chosen = torch.full_like(scale, torch.inf), scale, wanted
    for (start, whole), stretch in itertools.product(starts, STRETCHES):
        zero, refitted = whole.clamp(codec.zero.low, codec.zero.high), start * stretch
        for _ in range(REFITS):
            level = _levels(groups, refitted, zero)
            square = (weight * level.square()).sum(2)
            refitted = torch.where(square > 0, (weight * level * groups).sum(2) / square, refitted)
        value = refitted[..., None] * _levels(groups, refitted, zero)
        error = (weight * (groups - value).square()).sum(2)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, refitted, best)
        chosen = torch.where(better, zero, chosen)
    return best, chosen


def _levels(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The level nearest to each weight [R, G, g], -zero .. 15 - zero."""
    step = torch.where(scale == 0, torch.inf, scale)[..., None]
    return (groups / step).round().maximum(-zero[..., None]).minimum(LAST - zero[..., None])
