"""Choosing a format's scales and offsets for a matrix: the grid, before any code is solved.

Every fit minimises `sum_i importance_i (w_i - value_i)^2` per group of columns; which importance is the caller's choice
(`lqexport.moments.importance`). Real-valued scales and offsets come from a search over shrunken ranges, each followed
by weighted least-squares refits; then they are rounded as the file stores them. A table per row is exact k-means.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lqexport.formats.codec import GridCodec, ScaleFormat
from lqexport.grid import Numbers, TensorGrid, nearest_level, shared_levels
from lqexport.kernels import cpu
from lqexport.kernels.kmeans import weighted_kmeans

SHRINK = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5)
"""Fractions of a group's range that the search tries."""
CHUNK = 1 << 24
"""Weights fitted at once on a GPU; bounds the memory of the search."""


def fit(codec: GridCodec, weights: Tensor, importance: Tensor) -> TensorGrid:
    """The grid of `codec` for float32 weights [R, C] and importance [C], both on one device."""
    columns = weights.shape[1]
    if codec.scale is None:
        return TensorGrid(columns, _fit_table(weights, importance, codec.level_count), False)
    levels, uniform = shared_levels(codec, weights.device)
    group = codec.scale.group or columns
    weight = _normalized(importance.unflatten(0, (-1, group)))
    if weights.device.type == "cpu":
        scale, offset = _fit_cpu(weights, weight, levels, uniform, codec.offset)
    else:
        chunks = [part.unflatten(1, (-1, group)) for part in weights.split(max(1, CHUNK // columns))]
        parts = [_fit_groups(chunk, weight, levels, uniform, codec.offset) for chunk in chunks]
        scale, offset = torch.cat([s for s, _ in parts]), torch.cat([o for _, o in parts])
    return _stored(codec, columns, levels, uniform, scale, offset)


def _fit_cpu(
    weights: Tensor, weight: Tensor, levels: Tensor, uniform: bool, offset: ScaleFormat | None
) -> tuple[Tensor, Tensor]:
    """`_fit_groups` compiled: one parallel loop over rows instead of hundreds of passes over memory."""
    scale, shift = torch.zeros(2, len(weights), len(weight))
    cpu.fit_groups(
        weights.contiguous().numpy(), weight.contiguous().numpy(), levels[0].numpy(), uniform, offset is not None,
        offset is not None and offset.two_level, np.asarray(SHRINK, np.float32), scale.numpy(), shift.numpy(),
    )  # fmt: skip
    return scale, shift


def minmax(codec: GridCodec, weights: Tensor) -> TensorGrid:
    """The grid that spans each group's range, as GPTQ's own quantizer and plain rounding take it."""
    columns = weights.shape[1]
    if codec.scale is None:
        low, high = weights.amin(1, keepdim=True), weights.amax(1, keepdim=True)
        table = low + (high - low) * torch.linspace(0, 1, codec.level_count, device=weights.device)
        return TensorGrid(columns, round_half(table), False)
    levels, uniform = shared_levels(codec, weights.device)
    scale, offset = _span(weights.unflatten(1, (-1, codec.scale.group or columns)), levels, codec.offset, 1.0)
    return _stored(codec, columns, levels, uniform, scale, offset)


def round_half(values: Tensor) -> Tensor:
    """float32 values rounded to float16 ones; beyond its range, the largest."""
    return values.clamp(-65504, 65504).half().float()


def store(values: Tensor, format: ScaleFormat) -> Numbers:
    """Real numbers [R, G] rounded to what the file holds.

    Two-level formats take the float16 that puts the largest number of a superblock on the end of the integers' range.
    """
    values = values * format.sign
    if not format.two_level:
        return Numbers(format, round_half(values), torch.ones_like(values, dtype=torch.int16))
    blocks = values.unflatten(1, (-1, format.span))
    extreme = blocks.gather(2, blocks.abs().argmax(2, keepdim=True)).squeeze(2)
    supers = round_half(extreme / (format.low or format.high))
    spread = supers.repeat_interleave(format.span, 1)
    subs = (values / torch.where(spread == 0, torch.inf, spread)).round().clamp(format.low, format.high)
    return Numbers(format, supers, subs.to(torch.int16))


def _stored(codec: GridCodec, columns: int, levels: Tensor, uniform: bool, scale: Tensor, offset: Tensor) -> TensorGrid:
    assert codec.scale is not None
    shift = None if codec.offset is None else store(offset, codec.offset)
    return TensorGrid(columns, levels, uniform, store(scale, codec.scale), shift)


def _normalized(importance: Tensor) -> Tensor:
    """Importance [G, g] with sum 1 in each group; a group whose inputs are always zero is fitted evenly."""
    total = importance.sum(-1, keepdim=True)
    return torch.where(total > 0, importance / total, 1 / importance.shape[-1])


def _span(groups: Tensor, levels: Tensor, offset: ScaleFormat | None, shrink: float) -> tuple[Tensor, Tensor]:
    """Scale and offset [R, G] that map the levels onto `shrink` times the range of each group [R, G, g]."""
    first, last = levels[0, 0], levels[0, -1]
    if offset is None:
        extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True)).squeeze(2)
        scale = shrink * extreme / first  # in every codebook the first level has the largest magnitude
        return scale, torch.zeros_like(scale)
    low, high = groups.amin(2), groups.amax(2)
    if offset.two_level:  # what is stored is not negative and is subtracted
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale = shrink * (high - low) / (last - first)
    return scale, (low + high) / 2 - scale * (last + first) / 2


def _fit_groups(
    groups: Tensor, weight: Tensor, levels: Tensor, uniform: bool, offset: ScaleFormat | None
) -> tuple[Tensor, Tensor]:
    """Scale and offset [R, G] with the least weighted squared error found for groups [R, G, g]; weight [G, g]."""
    best_error = torch.full(groups.shape[:2], torch.inf, device=groups.device)
    best_scale = best_shift = torch.zeros_like(best_error)
    for shrink in SHRINK:
        scale, shift = _span(groups, levels, offset, shrink)
        for _ in range(2):
            chosen = _chosen(groups, scale, shift, levels, uniform)
            scale, shift = _refit(groups, weight, chosen, offset, scale)
        chosen = _chosen(groups, scale, shift, levels, uniform)
        error = (weight * (groups - scale[..., None] * chosen - shift[..., None]).square()).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale, best_shift = torch.where(better, scale, best_scale), torch.where(better, shift, best_shift)
    return best_scale, best_shift


def _chosen(groups: Tensor, scale: Tensor, shift: Tensor, levels: Tensor, uniform: bool) -> Tensor:
    """The level nearest to each weight [R, G, g]."""
    target = (groups - shift[..., None]) / torch.where(scale == 0, torch.inf, scale)[..., None]
    if uniform:
        return target.round_().clamp_(levels[0, 0], levels[0, -1])
    return levels[0][nearest_level(target.flatten(1), levels, uniform).long()].view_as(groups)


def _refit(
    groups: Tensor, weight: Tensor, chosen: Tensor, offset: ScaleFormat | None, old: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted least squares for scale and offset [R, G], the chosen levels fixed; `weight` sums to 1 in a group."""
    weighted = weight * chosen
    square, cross = (weighted * chosen).sum(-1), (weighted * groups).sum(-1)
    alone = torch.where(square > 0, cross / square, old)
    if offset is None:
        return alone, torch.zeros_like(alone)
    mean_level, mean = weighted.sum(-1), (weight * groups).sum(-1)
    variance = square - mean_level.square()
    scale = torch.where(variance > 1e-12, (cross - mean_level * mean) / variance, old)
    shift = mean - scale * mean_level
    if offset.two_level:
        scale, shift = torch.where(shift > 0, alone, scale), shift.clamp(max=0)
    return scale, shift


def _fit_table(weights: Tensor, importance: Tensor, count: int) -> Tensor:
    centers, _ = weighted_kmeans(weights.double().cpu().numpy(), importance.double().cpu().numpy(), count)
    return round_half(torch.as_tensor(centers, device=weights.device).float())
