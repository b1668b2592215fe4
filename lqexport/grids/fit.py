"""Chooses a format's scales and offsets, or tables, for a matrix: its grid, before any code is solved.

Every fit minimises `sum_i importance_i (w_i - value_i)^2` in each group of columns. The caller chooses the importance
(`lqexport.solver.importance`). Real-valued scales and offsets come from a search over ranges, with weighted
least-squares refits after each. Then they are rounded as the file stores them. A table per row is exact k-means.

Shapes: R rows, C columns, G groups of g columns each, K levels.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from lqexport.formats.codec import GridCodec, ScaleFormat
from lqexport.grids.grid import Numbers, TensorGrid, nearest_level, round_half, round_sub, round_super, shared_levels
from lqexport.grids.vectors import search_vectors
from lqexport.kernels import cpu, cuda, cuda_kmeans, cuda_solve
from lqexport.kernels.kmeans import weighted_kmeans

Cuts = tuple[tuple[float, float], ...]
"""Ranges that a search tries: the shares of a group's range that it leaves out below and above.

A negative share widens the range."""
STEPS = (0.0, 0.1, 0.2, 0.3)
"""Shares of a group's range that the search leaves out at each end.

LeanQuant's search goes up to 0.4, too, in 2048 steps of the range. Here the refits move a range on from where it
starts, so a few starts find what its thousands find (tests/test_solver.py)."""
TWO_SIDED: Cuts = tuple((low, high) for low in STEPS for high in STEPS)
"""The coarse search where the format has offsets."""
TWO_SIDED_FINE: Cuts = tuple((low, high) for low in (-0.05, 0, 0.05) for high in (-0.05, 0, 0.05) if low or high)
"""The fine search around the best of the coarse one, where the format has offsets."""
ONE_SIDED: Cuts = tuple((cut, cut) for cut in (-0.05, 0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5))
"""The coarse search where the format has no offset: shares of the largest magnitude that are left out."""
TERNARY: Cuts = (*ONE_SIDED, *((cut, cut) for cut in (0.6, 0.7, 0.8, 0.9)))
"""The coarse search where the format has few levels and no offset. With three, the best range of normal weights leaves
out more than half of the largest magnitude."""
ONE_SIDED_FINE: Cuts = ((-0.025, -0.025), (0.025, 0.025))
"""The fine search where the format has no offset."""
POWERS = (2.0, 1.0, 0.5, 0.25, 0.125)
"""Multiples of LQER's power that are tried where scales are powers of two."""
NEAR = (1.0, 0.7, 0.8, 0.9, 1.1, 1.2, 1.4, 2.0)
"""Multiples of the best real-valued scale that are tried, each rounded, where scales are floats of few bits."""
STRETCHES = (1.0, *(1 + step / 60 for step in range(-15, 16) if step))
"""Multiples of a superblock's obvious float16, the one that uses the whole range of its integers. All are tried."""
CHUNK = 1 << 24
"""Number of weights that are fitted at once on a GPU. It bounds the memory of the search."""


def fit(codec: GridCodec, weights: Tensor, importance: Tensor) -> TensorGrid:
    """Returns the grid of `codec` for float32 weights [R, C] and importance [C], both on one device."""
    columns = weights.shape[1]
    if codec.scale is None:
        return TensorGrid(columns, _fit_table(weights, importance, codec.level_count), False)
    levels, uniform = shared_levels(codec, weights.device)
    group = codec.scale.group or columns
    group_importance = normalized(importance.unflatten(0, (-1, group)))
    if codec.codebook is not None:
        return _fit_vectors(codec, weights, importance, levels)
    groups, floats = weights.unflatten(1, (-1, group)), codec.scale.floats
    if floats.mantissa:
        scale, offset = search(weights, group_importance, levels, uniform, codec.offset)
        scale = _unsigned(scale, levels)
    else:
        scale = _covering_power(groups, levels)
        offset = torch.zeros_like(scale)
    if floats.coarse:
        candidates = (round_super(scale * multiple, codec.scale) for multiple in (NEAR if floats.mantissa else POWERS))
        scale = _best(groups, group_importance, levels, uniform, candidates)
    return _stored(codec, columns, levels, uniform, scale, offset, importance.unflatten(0, (-1, group)).sum(1))


def _fit_vectors(codec: GridCodec, weights: Tensor, importance: Tensor, levels: Tensor) -> TensorGrid:
    """Returns the grid of a codec with a codebook. All arguments are as for `fit`; `levels` are [1, K]."""
    assert codec.scale is not None
    of_groups = importance.unflatten(0, (-1, codec.scale.group))
    scale, square = search_vectors(codec, weights, normalized(of_groups))
    numbers = store(scale, codec.scale, square * of_groups.sum(1))
    return TensorGrid(weights.shape[1], levels, False, numbers, codebook=codec.codebook)


def search(
    weights: Tensor, importance: Tensor, levels: Tensor, uniform: bool, offset: ScaleFormat | None
) -> tuple[Tensor, Tensor]:
    """Returns real-valued scales and offsets [R, G] with the least weighted squared error that the search finds.

    weights      float32 [R, C]
    importance   float32 [G, g], with sum 1 in each group (see `normalized`)
    levels       float32 [1, K]; `uniform` says whether they are consecutive integers
    offset       as in `GridCodec`; None if the format has no offset
    """
    if weights.device.type == "cpu":
        return _fit_cpu(weights, importance, levels, uniform, offset)
    if cuda.usable(weights.device):
        return _fit_cuda(weights, importance, levels, uniform, offset)
    chunks = [rows.unflatten(1, importance.shape) for rows in weights.split(max(1, CHUNK // weights.shape[1]))]
    fitted = [_fit_groups(chunk, importance, levels, uniform, offset) for chunk in chunks]
    return torch.cat([scale for scale, _ in fitted]), torch.cat([shift for _, shift in fitted])


def _fit_cpu(
    weights: Tensor, importance: Tensor, levels: Tensor, uniform: bool, offset: ScaleFormat | None
) -> tuple[Tensor, Tensor]:
    """Does what `_fit_groups` does in one compiled loop over rows, instead of hundreds of passes over memory."""
    scale, shift = torch.zeros(2, len(weights), len(importance))
    coarse, fine = (np.asarray(cuts, np.float32) for cuts in _cuts(offset, levels))
    not_positive = offset is not None and offset.two_level
    cpu.fit_groups(
        weights.contiguous().numpy(), importance.contiguous().numpy(), levels[0].numpy(), uniform, offset is not None,
        not_positive, coarse, fine, scale.numpy(), shift.numpy(),
    )  # fmt: skip
    return scale, shift


def _fit_cuda(
    weights: Tensor, importance: Tensor, levels: Tensor, uniform: bool, offset: ScaleFormat | None
) -> tuple[Tensor, Tensor]:
    """Does what `_fit_groups` does in one CUDA kernel."""
    coarse, fine = (torch.tensor(cuts, device=weights.device) for cuts in _cuts(offset, levels))
    not_positive = offset is not None and offset.two_level
    return cuda_solve.fit_groups(
        weights.contiguous(), importance.contiguous(), levels[0], uniform, offset is not None, not_positive,
        coarse, fine,
    )  # fmt: skip


def minmax(codec: GridCodec, weights: Tensor) -> TensorGrid:
    """Returns the grid that spans each group's range, for float32 weights [R, C], as GPTQ and plain rounding do.

    Two levels stand for a group's mean magnitude, as llama.cpp's quantizer has it.
    """
    columns = weights.shape[1]
    if codec.scale is None:
        low, high = weights.amin(1, keepdim=True), weights.amax(1, keepdim=True)
        table = low + (high - low) * torch.linspace(0, 1, codec.level_count, device=weights.device)
        return TensorGrid(columns, round_half(table), False)
    levels, uniform = shared_levels(codec, weights.device)
    groups = weights.unflatten(1, (-1, codec.scale.group or columns))
    if codec.level_count == 2:
        scale = groups.abs().mean(2)
        offset = torch.zeros_like(scale)
    elif codec.scale.floats.mantissa:
        scale, offset = _span(groups, levels, codec.offset, torch.zeros(2, 1, 1, device=weights.device))
        scale = _unsigned(scale, levels)
    else:
        scale = _covering_power(groups, levels)
        offset = torch.zeros_like(scale)
    return _stored(codec, columns, levels, uniform, scale, offset)


def store(values: Tensor, format: ScaleFormat, importance: Tensor | None = None) -> Numbers:
    """Returns real-valued scales or offsets [R, G] rounded to what the file can hold.

    In a two-level format a superblock's obvious float16 puts the superblock's largest number on the end of the
    integers' range. That one and its multiples by `STRETCHES` are tried, and the one with the least squared error of
    the numbers is kept. Errors are weighted by `importance` [G] or [R, G], the sum over a group's columns (None: all
    groups alike). docs/solver.md has a worked example ("A superblock of Q4_K").
    """
    values = values * format.sign
    if not format.two_level:
        return Numbers(format, round_super(values, format), torch.ones_like(values, dtype=torch.int16))
    blocks = values.unflatten(1, (-1, format.span))
    extreme = blocks.gather(2, blocks.abs().argmax(2, keepdim=True)).squeeze(2)
    importance = torch.ones_like(values[0]) if importance is None else importance
    importance = importance.unflatten(-1, (-1, format.span))
    least = torch.full_like(extreme, torch.inf)
    supers, subs = torch.zeros_like(extreme), torch.zeros_like(blocks)
    for stretch in STRETCHES:
        candidate = round_half(stretch * extreme / format.end)
        step = torch.where(candidate == 0, torch.inf, candidate)[..., None]
        integers = round_sub(blocks / step, format)
        error = (importance * (candidate[..., None] * integers - blocks).square()).sum(2)
        better = error < least
        least = torch.where(better, error, least)
        supers = torch.where(better, candidate, supers)
        subs = torch.where(better[..., None], integers, subs)
    return Numbers(format, supers, subs.flatten(1).to(torch.int16))


def _stored(
    codec: GridCodec, columns: int, levels: Tensor, uniform: bool, scale: Tensor, offset: Tensor,
    importance: Tensor | None = None,
) -> TensorGrid:  # fmt: skip
    assert codec.scale is not None
    shift = None if codec.offset is None else store(offset, codec.offset, importance)
    stored = store(scale, codec.scale, importance)
    return TensorGrid(columns, levels, uniform, stored, shift, codec.rounding, codec.codebook)


def normalized(importance: Tensor) -> Tensor:
    """Returns importance [..., g] scaled to sum 1 in each group. A group whose inputs are always zero counts evenly."""
    total = importance.sum(-1, keepdim=True)
    return torch.where(total > 0, importance / total, 1 / importance.shape[-1])


def _covering_power(groups: Tensor, levels: Tensor) -> Tensor:
    """Returns the least powers of two [R, G] that put groups [R, G, g] at most 1 beyond the last level.

    In MXINT these are LQER's steps: 2^(e - (B - 1)) with e = ceil(log2 max |w|), for B bits.
    """
    least = (groups.abs().amax(2) / (levels[0, -1] + 1)).clamp(2.0**-24, 2.0**15)
    mantissa = least.frexp().mantissa
    return torch.where(mantissa == 0.5, least, least / mantissa)


def _unsigned(scale: Tensor, levels: Tensor) -> Tensor:
    """Returns the scales without their signs where levels [1, K] are symmetric, so that the sign says nothing."""
    return scale.abs() if torch.equal(levels, -levels.flip(1)) else scale


def _best(groups: Tensor, importance: Tensor, levels: Tensor, uniform: bool, candidates: Iterable[Tensor]) -> Tensor:
    """Returns the scales [R, G] of least weighted squared error for groups [R, G, g], out of candidates [R, G].

    The first of the best is taken. `importance` is [G, g].
    """
    none = torch.zeros(groups.shape[:2], device=groups.device)
    best, error = none, torch.full_like(none, torch.inf)
    for scale in candidates:
        value = scale[..., None] * _chosen(groups, scale, none, levels, uniform)
        scale_error = (importance * (groups - value).square()).sum(-1)
        best, error = torch.where(scale_error < error, scale, best), error.minimum(scale_error)
    return best


def _cuts(offset: ScaleFormat | None, levels: Tensor) -> tuple[Cuts, Cuts]:
    if offset is not None:
        return TWO_SIDED, TWO_SIDED_FINE
    return TERNARY if levels.shape[1] <= 3 else ONE_SIDED, ONE_SIDED_FINE


def _span(groups: Tensor, levels: Tensor, offset: ScaleFormat | None, cut: Tensor) -> tuple[Tensor, Tensor]:
    """Returns scale and offset [R, G] that map the levels onto the range of each group [R, G, g], cut at both ends."""
    first, last = levels[0, 0], levels[0, -1]
    if offset is None:
        extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True)).squeeze(2)
        scale = (1 - cut[0]) * extreme / first  # in every codebook the first level has the largest magnitude
        return scale, torch.zeros_like(scale)
    low, high = groups.amin(2), groups.amax(2)
    if offset.two_level:  # the stored number is not negative, and it is subtracted
        low, high = low.clamp(max=0), high.clamp(min=0)
    low, high = low + cut[0] * (high - low), high - cut[1] * (high - low)
    scale = (high - low) / (last - first)
    return scale, low - scale * first


def _fit_groups(
    groups: Tensor, importance: Tensor, levels: Tensor, uniform: bool, offset: ScaleFormat | None
) -> tuple[Tensor, Tensor]:
    """Returns scale and offset [R, G] of least weighted squared error for groups [R, G, g] and importance [G, g]."""
    shape = (5, *groups.shape[:2])
    best = torch.zeros(shape, device=groups.device)  # rows: error, scale, shift, cut below, cut above
    best[0] = torch.inf
    coarse, fine = _cuts(offset, levels)
    for cuts in (coarse, fine):
        start = best[3:]  # all zero at first, then the best cuts of the coarse search
        for cut in cuts:
            moved = start + torch.tensor(cut, device=groups.device)[:, None, None]
            scale, shift = _span(groups, levels, offset, moved)
            for _ in range(2):
                chosen = _chosen(groups, scale, shift, levels, uniform)
                scale, shift = _refit(groups, importance, chosen, offset, scale)
            chosen = _chosen(groups, scale, shift, levels, uniform)
            error = (importance * (groups - scale[..., None] * chosen - shift[..., None]).square()).sum(-1)
            best = torch.where(error < best[0], torch.stack((error, scale, shift, *moved)), best)
    return best[1], best[2]


def _chosen(groups: Tensor, scale: Tensor, shift: Tensor, levels: Tensor, uniform: bool) -> Tensor:
    """Returns the level nearest to each weight [R, G, g]."""
    target = (groups - shift[..., None]) / torch.where(scale == 0, torch.inf, scale)[..., None]
    if uniform:
        return target.round_().clamp_(levels[0, 0], levels[0, -1])
    return levels[0][nearest_level(target.flatten(1), levels, uniform).long()].view_as(groups)


def _refit(
    groups: Tensor, importance: Tensor, chosen: Tensor, offset: ScaleFormat | None, old: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns weighted least-squares scales and offsets [R, G] for fixed levels; `importance` sums to 1 in a group."""
    weighted = importance * chosen
    square, cross = (weighted * chosen).sum(-1), (weighted * groups).sum(-1)
    alone = torch.where(square > 0, cross / square, old)
    if offset is None:
        return alone, torch.zeros_like(alone)
    mean_level, mean = weighted.sum(-1), (importance * groups).sum(-1)
    variance = square - mean_level.square()
    scale = torch.where(variance > 1e-12, (cross - mean_level * mean) / variance, old)
    shift = mean - scale * mean_level
    if offset.two_level:
        scale, shift = torch.where(shift > 0, alone, scale), shift.clamp(max=0)
    return scale, shift


def _fit_table(weights: Tensor, importance: Tensor, count: int) -> Tensor:
    if cuda.usable(weights.device):
        return round_half(cuda_kmeans.weighted_kmeans(weights, importance, count)[0].float())
    centers, _ = weighted_kmeans(weights.double().cpu().numpy(), importance.double().cpu().numpy(), count)
    return round_half(torch.as_tensor(centers, device=weights.device).float())
