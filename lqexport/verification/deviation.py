"""Tells by one tensor's weights alone whether they differ from the source's in a way that no quantizer leaves.

A file's tensor is compared with the source's and with the source's rounded to nearest in the same type. Rounding to
nearest gives the rounded source. A solver moves single weights, but neither the size of the whole matrix, nor that of a
row or a block by much. The limits leave room over what was seen in files that `quantize` made (docs/reliability.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RUN = 32
"""Columns of a row that are looked at together: a block of GGUF, or a part of one."""
ROWS = 1024
"""Rows that are compared at once."""
EQUAL = 2e-3
"""Relative difference below which two numbers are the same: devices may round a float16 scale apart."""
MULTIPLE = 0.9
"""Share of weights that are the same multiple of the rounded source's in a tensor that was scaled."""
ROUNDED = 0.98
"""Share of runs that are the rounded source's in a tensor that was rounded to nearest."""
WORSE = 4.0
"""A run of such a tensor is wrong if its squared error is this many times that of rounding."""
FACTOR, FACTOR_OF_ERROR, LARGEST_FACTOR = 0.012, 15.0, 0.3
"""How much the size of a matrix may differ: a share, plus a multiple of rounding's relative squared error; at most."""
RUN_FACTOR, RUN_FACTOR_OF_ERROR = 0.1, 10.0
"""How much the size of a run may differ, as a share, and as a multiple of rounding's relative error in amplitude."""
ROW_ERROR, ROW_ERROR_OF_ERROR = 0.5, 30.0
"""The relative squared error that a row may have, in itself, and as a multiple of rounding's."""
LEAST = 16
"""The fewest weights that say anything about a tensor."""


@dataclass(frozen=True)
class _Runs:
    """Sums over runs of a row, each [rows, runs]: of squares of the source's weights and of the errors, and the rest.

    energy    squares of the source's weights
    product   file times source
    error, rounding   squared errors of the file and of the rounded source
    same      whether all weights are the rounded source's
    """

    energy: Tensor
    product: Tensor
    error: Tensor
    rounding: Tensor
    same: Tensor


def deviation(file: Tensor, rounded: Tensor, source: Tensor) -> str | None:
    """Returns how a file's tensor differs from the source's as no quantizer leaves it; None if it does not.

    The result is the rest of a sentence that begins with the tensor's name.

    file, rounded, source   float32 [rows, columns] or [n]: the file's weights, the source's rounded to nearest in the
                            type of the file's, and the source's
    """
    if file.numel() < LEAST or not bool(source.any()):
        return None
    if (factor := _multiple(file, rounded)) is not None:
        return f"is {factor:.4g} times the source's"
    matrices = [values.reshape(-1, values.shape[-1]) for values in (file, rounded, source)]
    runs = _runs(*matrices)
    if wrong := _wrong_runs(runs, *matrices[:2]):
        return f"is the source's, rounded, but for {wrong} of {runs.same.numel()} blocks"
    return _unlike_solved(runs) if file.ndim == 2 else None


def _multiple(file: Tensor, rounded: Tensor) -> float | None:
    """Returns the factor by which nearly all weights differ from the rounded source's; None if there is none but 1."""
    factor = float(torch.vdot(file.flatten(), rounded.flatten()) / rounded.square().sum().clamp_min(1e-30))
    if abs(factor - 1) <= EQUAL:
        return None
    used = same = 0
    for ours, theirs in zip(file.split(ROWS), rounded.split(ROWS), strict=True):
        used += int((theirs != 0).sum())
        same += int(((ours - factor * theirs).abs() <= EQUAL * ours.abs())[theirs != 0].sum())
    return factor if same > MULTIPLE * max(used, LEAST) else None


def _runs(file: Tensor, rounded: Tensor, source: Tensor) -> _Runs:
    chunks = zip(*(values.split(ROWS) for values in (file, rounded, source)), strict=True)
    parts = [_of_rows(*map(_in_runs, chunk)) for chunk in chunks]
    return _Runs(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _in_runs(rows: Tensor) -> Tensor:
    """Returns rows [rows, columns] as runs [rows, runs, columns of a run]."""
    columns = rows.shape[1]
    width = math.gcd(columns, RUN) if math.gcd(columns, RUN) >= RUN // 4 else columns
    return rows.reshape(len(rows), columns // width, width)


def _of_rows(file: Tensor, rounded: Tensor, source: Tensor) -> tuple[Tensor, ...]:
    return (
        source.square().sum(-1),
        (file * source).sum(-1),
        (file - source).square_().sum(-1),
        (rounded - source).square_().sum(-1),
        (file == rounded).all(-1),
    )


def _wrong_runs(runs: _Runs, file: Tensor, rounded: Tensor) -> int:
    """Returns the number of runs that are wrong in a tensor that was rounded to nearest; 0 in any other tensor.

    Another quantizer may round a few runs otherwise, so a wrong one has a larger error or another scale.
    """
    used = runs.energy > 0
    if float(runs.same[used].float().mean()) < ROUNDED:
        return 0
    worse = runs.error > WORSE * runs.rounding + 1e-6 * runs.energy
    rows = (~runs.same).any(1)
    scaled = torch.zeros_like(runs.same)
    scaled[rows] = _scaled(_in_runs(file[rows]), _in_runs(rounded[rows]))
    return int((~runs.same & (worse | scaled)).sum())


def _scaled(file: Tensor, rounded: Tensor) -> Tensor:
    """Returns whether each run is a multiple of the rounded source's, and not the same.

    A run of zeros is none: with three levels, few weights are above 0, and another quantizer may round them to 0.
    """
    size = rounded.square().sum(-1, keepdim=True)
    factor = (file * rounded).sum(-1, keepdim=True) / size.clamp_min(1e-30)
    multiple = ((file - factor * rounded).abs() <= EQUAL * file.abs()).all(-1)
    return multiple & ((factor - 1).abs() > EQUAL)[..., 0] & (size > 0)[..., 0] & (file != 0).any(-1)


def _unlike_solved(runs: _Runs) -> str | None:
    """Returns what is wrong with a matrix that may have been solved; None if nothing is."""
    energy, product = runs.energy.sum(dtype=torch.float64), runs.product.sum(dtype=torch.float64)
    expected = float(runs.rounding.sum(dtype=torch.float64) / energy)
    factor = float(product / energy)
    if abs(factor - 1) > min(FACTOR + FACTOR_OF_ERROR * expected, LARGEST_FACTOR):
        return f"is about {factor:.3g} times as large as the source's"
    large = runs.energy > runs.energy[runs.energy > 0].median() / 4
    factors = (runs.product / runs.energy.clamp_min(1e-30))[large]
    if wrong := int(((factors - factor).abs() > RUN_FACTOR + RUN_FACTOR_OF_ERROR * expected**0.5).sum()):
        return f"has {wrong} of {runs.same.numel()} blocks of another size than the source's"
    by_row = runs.energy.sum(1)
    errors = (runs.error.sum(1) / by_row.clamp_min(1e-30))[by_row > by_row[by_row > 0].median() / 8]
    if wrong := int((errors > ROW_ERROR + ROW_ERROR_OF_ERROR * expected).sum()):
        return f"has {wrong} of {len(by_row)} rows that are not the source's"
    return None
