"""Chooses the stored numbers of a matrix in sections, before any code is solved.

EXL2's maxima and scale codes are fitted here, GPTQ's scales and zero points in `lqexport.grids.fit_zeros`.

In EXL2 all rows share the maximum of a group of columns, and each row has a scale code of 4 bits for it. Several maxima
are tried. For each of them every row takes the scale code with the least weighted squared error, computed with the
scale that ExLlamaV2 will compute. The maximum with the least sum of errors over the rows is kept.
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
"""Maxima that are tried, as shares of the one with which the largest weight of all rows is on the end of the grid."""
FINE = (-0.03, -0.015, 0.015, 0.03)
"""What is added to the best of these shares in a second round."""


def fit_sections(codec: SectionedCodec, weights: Tensor, importance: Tensor, order: Tensor) -> TensorSections:
    """Returns the fitted sections of `codec`.

    weights      float32 [R, C]
    importance   float32 [C]
    order        int64 [C], the order in which columns will be stored
    """
    if isinstance(codec, Gptq):
        return TensorSections(order, (fit_zeros(codec, weights[:, order].contiguous(), importance[order]),))
    assert isinstance(codec, Exl2)
    return _sections(
        codec, weights[:, order], order, lambda stored, run, where: _fit_run(stored, run, importance[where])
    )


def minmax_sections(codec: SectionedCodec, weights: Tensor, order: Tensor) -> TensorSections:
    """Returns sections that span each group's range, for the same weights and order as `fit_sections`.

    ExLlamaV2's converter begins its search with this grid, and GPTQ's quantizer uses it.
    """
    if isinstance(codec, Gptq):
        return TensorSections(order, (span_zeros(codec, weights[:, order]),))
    assert isinstance(codec, Exl2)
    return _sections(codec, weights[:, order], order, lambda stored, run, _: _span_run(stored, run))


def _sections(
    codec: Exl2,
    stored: Tensor,
    order: Tensor,
    fit_run: Callable[[Tensor, Run, Tensor], tuple[Tensor, Tensor]],
) -> TensorSections:
    """Returns the sections whose maxima and scale codes `fit_run` computes, for columns [R, C] in stored order.

    `fit_run` takes the columns [R, c] of a run, the run, and the indices of these columns in the matrix.
    """
    sections, start = [], 0
    for run in codec.runs:
        where = slice(start, start + run.columns)
        maxima, subs = fit_run(stored[:, where], run, order[where])
        table = torch.as_tensor(levels(run.bits), device=stored.device)[None]
        sections.append(SquaredSection(table, run.group, maxima, subs))
        start = where.stop
    return TensorSections(order, tuple(sections))


def _base(groups: Tensor, bits: int) -> Tensor:
    """Returns the scale [R, G] under which the largest weight of each group [R, G, g] falls on the end of the grid.

    That end is the mean of the magnitudes of the first and the last level.
    """
    return groups.abs().amax(2) / (2 ** (bits - 1) - 0.5)


def _span_run(stored: Tensor, run: Run) -> tuple[Tensor, Tensor]:
    base = _base(stored.unflatten(1, (-1, run.group)), run.bits)
    maxima = storable(base.amax(0), run.bits)
    share = base / torch.where(maxima == 0, torch.inf, maxima)
    return maxima, ((16 * share.sqrt()).round() - 1).clamp(0, 15).to(torch.int16)


def _fit_run(stored: Tensor, run: Run, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the maxima [G] and scale codes int16 [R, G] of the columns [R, c] of one run."""
    group_importance = normalized(importance.unflatten(0, (-1, run.group)))
    base = _base(stored.unflatten(1, (-1, run.group)), run.bits).amax(0)
    pairs = [
        _fit_group(group.contiguous(), group_importance[g], run.bits, base[g])
        for g, group in enumerate(stored.split(run.group, dim=1))
    ]
    return torch.stack([maximum for maximum, _ in pairs]), torch.stack([subs for _, subs in pairs], dim=1)


def _fit_group(group: Tensor, importance: Tensor, bits: int, base: Tensor) -> tuple[Tensor, Tensor]:
    shares = torch.tensor(COARSE, device=group.device)
    _, errors, _ = _tried(group, importance, bits, shares * base)
    shares = shares[errors.sum(0).argmin()] + torch.tensor((0.0, *FINE), device=group.device)
    maxima, errors, subs = _tried(group, importance, bits, shares * base)
    best = errors.sum(0).argmin()
    return maxima[best], subs[:, best]


def _tried(group: Tensor, importance: Tensor, bits: int, maxima: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the maxima [M] as stored, and the least error of each row and its scale code [R, M]."""
    maxima = storable(maxima, bits)
    scales = squared_scale(maxima[:, None], torch.arange(16, device=group.device))
    if group.device.type == "cpu":
        return maxima, *_best_subs_cpu(group, importance, scales, bits)
    best = _best_subs_cuda if cuda.usable(group.device) else _best_subs
    return maxima, *best(group, importance, scales, bits)


def _best_subs_cpu(group: Tensor, importance: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    errors = torch.empty(len(group), len(scales))
    subs = torch.zeros(errors.shape, dtype=torch.int16)
    low, high = np.float32(-(2 ** (bits - 1))), np.float32(2 ** (bits - 1) - 1)
    squared.best_subs(group.numpy(), importance.numpy(), scales.numpy(), low, high, errors.numpy(), subs.numpy())
    return errors, subs


def _best_subs_cuda(group: Tensor, importance: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    low, high = float(-(2 ** (bits - 1))), float(2 ** (bits - 1) - 1)
    return cuda_squared.best_subs(group, importance.contiguous(), scales, low, high)


def _best_subs(group: Tensor, importance: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Returns the least error and its scale code [R, M] for weights [R, g] and scales [M, 16]."""
    best = torch.full((len(group), len(scales)), torch.inf, device=group.device)
    subs = torch.zeros(best.shape, dtype=torch.int16, device=group.device)
    for code in range(16):
        for m, scale in enumerate(scales[:, code]):
            level = (group / torch.where(scale == 0, torch.inf, scale)).round()
            difference = group - scale * level.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            error = (importance * difference.square()).sum(1)
            better = error < best[:, m]
            subs[:, m] = torch.where(better, code, subs[:, m])
            best[:, m] = torch.where(better, error, best[:, m])
    return best, subs
