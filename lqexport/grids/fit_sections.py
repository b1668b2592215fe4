"""Choosing the numbers of a grid whose columns are stored in an order of their own, before any code is solved: EXL2's
maxima and scale codes here, GPTQ's scales and zero points in `lqexport.grids.fit_zeros`.

Of each of EXL2's groups of columns, the maximum is shared by all rows and the scale code of 4 bits is a row's own. For
every maximum that is tried, each row takes the code with the least weighted squared error, by the scale that ExLlamaV2
will compute; the maximum with the least sum over the rows is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lqexport.formats.codec import Run, SectionedCodec
from lqexport.formats.exl2 import Exl2, levels
from lqexport.formats.gptq import Gptq
from lqexport.grids.fit import normalized
from lqexport.grids.fit_zeros import fit_zeros, span_zeros
from lqexport.grids.sections import SquaredSection, TensorSections, squared_scale, storable
from lqexport.kernels import cuda, cuda_squared, squared

COARSE = tuple(0.4 + 0.06 * step for step in range(13))
FINE = (-0.03, -0.015, 0.015, 0.03)
"""Maxima that are tried, as shares of the one under which the largest weight of any row falls on the end of the grid;
then around the best."""


def fit_sections(codec: SectionedCodec, weights: Tensor, importance: Tensor, order: Tensor) -> TensorSections:
    """The grid of `codec` for float32 weights [R, C], importance [C], and the order int64 [C] in which columns will be
    stored."""
    if isinstance(codec, Gptq):
        return TensorSections(order, (fit_zeros(codec, weights[:, order].contiguous(), importance[order]),))
    assert isinstance(codec, Exl2)
    return _sections(codec, weights[:, order], order, lambda part, run, where: _fit_run(part, run, importance[where]))


def minmax_sections(codec: SectionedCodec, weights: Tensor, order: Tensor) -> TensorSections:
    """The grid that spans each group's range, as ExLlamaV2's converter begins its search and GPTQ's quantizer takes
    it."""
    if isinstance(codec, Gptq):
        return TensorSections(order, (span_zeros(codec, weights[:, order]),))
    assert isinstance(codec, Exl2)
    return _sections(codec, weights[:, order], order, lambda part, run, _: _span_run(part, run))


def _sections(
    codec: Exl2,
    stored: Tensor,
    order: Tensor,
    fit_run: Callable[[Tensor, Run, Tensor], tuple[Tensor, Tensor]],
) -> TensorSections:
    """Every run's maxima and scale codes by `fit_run`, which takes its stored columns [R, c], the run, and the columns'
    places in the matrix."""
    sections, start = [], 0
    for run in codec.runs:
        where = slice(start, start + run.columns)
        maxima, subs = fit_run(stored[:, where], run, order[where])
        table = torch.as_tensor(levels(run.bits), device=stored.device)[None]
        sections.append(SquaredSection(table, run.group, maxima, subs))
        start = where.stop
    return TensorSections(order, tuple(sections))


def _base(groups: Tensor, bits: int) -> Tensor:
    """The scale [R, G] under which the largest weight of each group [R, G, g] falls between its end levels."""
    return groups.abs().amax(2) / (2 ** (bits - 1) - 0.5)


def _span_run(part: Tensor, run: Run) -> tuple[Tensor, Tensor]:
    base = _base(part.unflatten(1, (-1, run.group)), run.bits)
    maxima = storable(base.amax(0), run.bits)
    share = base / torch.where(maxima == 0, torch.inf, maxima)
    return maxima, ((16 * share.sqrt()).round() - 1).clamp(0, 15).to(torch.int16)


def _fit_run(part: Tensor, run: Run, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Maxima [G] and scale codes int16 [R, G] of the columns of one run."""
    weight = normalized(importance.unflatten(0, (-1, run.group)))
    base = _base(part.unflatten(1, (-1, run.group)), run.bits).amax(0)
    pairs = [
        _fit_group(group.contiguous(), weight[g], run.bits, base[g])
        for g, group in enumerate(part.split(run.group, dim=1))
    ]
    return torch.stack([maximum for maximum, _ in pairs]), torch.stack([subs for _, subs in pairs], dim=1)


def _fit_group(group: Tensor, weight: Tensor, bits: int, base: Tensor) -> tuple[Tensor, Tensor]:
    shares = torch.tensor(COARSE, device=group.device)
    _, errors, _ = _tried(group, weight, bits, shares * base)
    shares = shares[errors.sum(0).argmin()] + torch.tensor((0.0, *FINE), device=group.device)
    maxima, errors, subs = _tried(group, weight, bits, shares * base)
    best = errors.sum(0).argmin()
    return maxima[best], subs[:, best]


def _tried(group: Tensor, weight: Tensor, bits: int, maxima: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The maxima [M] as stored, and for each row the least error and its scale code [R, M]."""
    maxima = storable(maxima, bits)
    scales = squared_scale(maxima[:, None], torch.arange(16, device=group.device))
    if group.device.type == "cpu":
        return maxima, *_best_subs_cpu(group, weight, scales, bits)
    best = _best_subs_cuda if cuda.usable(group.device) else _best_subs
    return maxima, *best(group, weight, scales, bits)


def _best_subs_cpu(group: Tensor, weight: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    errors = torch.empty(len(group), len(scales))
    subs = torch.zeros(errors.shape, dtype=torch.int16)
    low, high = np.float32(-(2 ** (bits - 1))), np.float32(2 ** (bits - 1) - 1)
    squared.best_subs(group.numpy(), weight.numpy(), scales.numpy(), low, high, errors.numpy(), subs.numpy())
    return errors, subs


def _best_subs_cuda(group: Tensor, weight: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    low, high = float(-(2 ** (bits - 1))), float(2 ** (bits - 1) - 1)
    return cuda_squared.best_subs(group, weight.contiguous(), scales, low, high)


def _best_subs(group: Tensor, weight: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Least error and its scale code [R, M] for weights [R, g] and scales [M, 16]."""
    best = torch.full((len(group), len(scales)), torch.inf, device=group.device)
    subs = torch.zeros(best.shape, dtype=torch.int16, device=group.device)
    for code in range(16):
        for m, scale in enumerate(scales[:, code]):
            level = (group / torch.where(scale == 0, torch.inf, scale)).round()
            off = group - scale * level.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            error = (weight * off.square()).sum(1)
            better = error < best[:, m]
            subs[:, m] = torch.where(better, code, subs[:, m])
            best[:, m] = torch.where(better, error, best[:, m])
    return best, subs
