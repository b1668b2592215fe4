"""Describes how a file's tensor differs from the source's beyond rounding: scaled, swapped, or in another order."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lqexport.models.interface import Weights
from lqexport.verification.verify_tensors import relative_error

SUSPECT = 4.0
"""A tensor is suspected if its relative squared error is above this many times that of rounding."""
NOISE = 1e-8
"""Relative squared error that counts as none."""
ROWS = 16384
"""Largest number of rows whose order is looked into, since every row is compared with every other."""
EXPLAINED = 0.25
"""An explanation holds if it leaves at most this share of the error."""


def fault_of(
    names: Sequence[str], among: Sequence[str], file: Weights, rounded: Weights, source: Weights
) -> str | None:
    """Returns a sentence about the tensor that is furthest from the source's beyond rounding; None if none is.

    names   the tensors that may be wrong, by the source's names
    among   the tensors of the same part of the model, one of which may stand in another's place
    """
    errors = {name: _error(file, source, name) for name in names}
    excess = {name: error / (_error(rounded, source, name) + NOISE) for name, error in errors.items()}
    name = max(names, key=lambda name: excess[name], default=None)
    if name is None or excess[name] <= SUSPECT:
        return None
    return f"{name} {_description(name, among, errors[name], file, source)}."


def _error(weights: Weights, source: Weights, name: str) -> float:
    return relative_error(weights.read(name).float().numpy(), source.read(name))


def _description(name: str, among: Sequence[str], error: float, file: Weights, source: Weights) -> str:
    """Returns the simplest explanation of a tensor's error that leaves little of it."""
    values, original = file.read(name).float(), source.read(name).float()
    factor = float((values * original).sum() / original.square().sum())
    if _left(values, factor * original) < EXPLAINED * error:
        return f"is {factor:.4g} times the source's"
    for other in among:
        same_shape = other != name and source.shape(other) == tuple(values.shape)
        if same_shape and _left(values, source.read(other).float()) < EXPLAINED * error:
            return f"holds what the source has as {other}"
    if len(values) <= ROWS and _left(*_in_one_order(values, original)) < EXPLAINED * error:
        return f"holds the source's {'values' if values.ndim == 1 else 'rows'} in another order"
    return f"is off by {error**0.5:.2g} of its size, more than rounding"


def _left(values: Tensor, explanation: Tensor) -> float:
    return relative_error(values.numpy(), explanation)


def _in_one_order(values: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
    """Returns both vectors sorted; of matrices, the first and for each of its rows the other's most similar row."""
    if values.ndim == 1:
        return values.sort().values, original.sort().values
    similar = nn.functional.normalize(values, dim=1) @ nn.functional.normalize(original, dim=1).T
    return values, original[similar.argmax(1)]
