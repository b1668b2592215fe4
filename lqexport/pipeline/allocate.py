"""Which type each tensor gets, so that the predicted loss is least and the file is no larger than a budget.

The multiple-choice knapsack problem: for every tensor exactly one of its options, least sum of losses, sum of bytes at
most the budget. Tensor by tensor, all partial choices are kept that may still lead to the best whole: none that another
one beats in both bytes and loss, and none whose bound is above a whole choice that is known. The bound of a partial
choice is its Lagrangian (= linear) relaxation: the tensors that are left may mix their options in any shares. All of it
is arithmetic in a fixed order, so equal input gives the equal choice on any machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lqexport.errors import UserError

RELATIVE_GAP = 1e-4
"""Partial choices that could lower the loss by less than this share are dropped; predictions are far less exact."""
MOST_STATES = 20_000
"""Most partial choices kept, those of the lowest bounds; what dropping others may cost is in `gap`."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Option:
    """One way to store a tensor: its name, its bytes, and the loss that it is predicted to cost (any unit, but the
    same for all tensors, since losses are added)."""

    name: str
    nbytes: int
    loss: float


@dataclass(frozen=True)
class Allocation:
    """chosen   one option per tensor;  nbytes, loss   their sums;  gap   by how much at most another choice within the
    budget could have a lower loss"""

    chosen: dict[str, Option]
    nbytes: int
    loss: float
    gap: float


def reachable(tensors: Mapping[str, Sequence[Option]]) -> tuple[int, int]:
    """The least and the most bytes that any choice takes."""
    sizes = [[option.nbytes for option in options] for options in tensors.values()]
    return sum(map(min, sizes)), sum(map(max, sizes))


def allocate(tensors: Mapping[str, Sequence[Option]], limit_bytes: int) -> Allocation:
    """The option of every tensor that makes the sum of losses least within `limit_bytes` bytes.

    Raises UserError where even the smallest options take more, naming the reachable sizes, and ValueError for an option
    whose loss is negative or not finite.
    """
    for name, options in tensors.items():
        if wrong := [option for option in options if not 0 <= option.loss < np.inf]:
            raise ValueError(f"{name}: the predicted loss of {wrong[0].name} is {wrong[0].loss}, not a finite number.")
    least, most = reachable(tensors)
    if limit_bytes < least:
        raise UserError(f"No choice of types fits in {limit_bytes} bytes: from {least} to {most} bytes can be reached.")
    useful = [_undominated(options) for options in tensors.values()]
    picked, bound = _search(useful, limit_bytes)
    chosen = {name: options[index] for name, options, index in zip(tensors, useful, picked, strict=True)}
    loss = sum(option.loss for option in chosen.values())
    return Allocation(chosen, sum(option.nbytes for option in chosen.values()), loss, max(0.0, loss - bound))


def _undominated(options: Sequence[Option]) -> list[Option]:
    """By rising bytes and falling loss."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.nbytes, option.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


@dataclass(frozen=True)
class _Steps:
    """The relaxation of some tensors: from the smallest options on, steps [n] along each tensor's lower convex hull,
    the steepest first. bytes_used, loss [n + 1] are the sums after each step; tensor, index [n] say where it leads.
    """

    bytes_used: Floats
    loss: Floats
    tensor: NDArray[np.int64]
    index: NDArray[np.int64]

    def bound(self, limit_bytes: Floats) -> Floats:
        """The least loss of these tensors within each budget; infinite where none fits."""
        return np.where(limit_bytes < self.bytes_used[0], np.inf, np.interp(limit_bytes, self.bytes_used, self.loss))


def _steps(tensors: list[list[Option]], first: int) -> _Steps:
    """The relaxation of all tensors from number `first` on."""
    rows = []
    for number, options in enumerate(tensors[first:], first):
        hull = _hull(options)
        for before, after in itertools.pairwise(hull):
            size, gain = options[after].nbytes - options[before].nbytes, options[before].loss - options[after].loss
            rows.append((-gain / size, number, after, size, gain))
    table = np.array(sorted(rows)).reshape(-1, 5)
    start = [sum(getattr(options[0], what) for options in tensors[first:]) for what in ("nbytes", "loss")]
    sums = np.cumsum(np.concatenate([[start], table[:, 3:] * [1, -1]]), axis=0)
    return _Steps(sums[:, 0], sums[:, 1], table[:, 1].astype(np.int64), table[:, 2].astype(np.int64))


def _hull(options: list[Option]) -> list[int]:
    """Indices of the options on the lower convex hull of loss over bytes."""
    hull: list[int] = []
    for index, option in enumerate(options):
        while len(hull) > 1 and _above(options[hull[-2]], options[hull[-1]], option):
            hull.pop()
        hull.append(index)
    return hull


def _above(left: Option, middle: Option, right: Option) -> bool:
    """Whether the middle one lies on or above the line through the others."""
    across = (middle.loss - left.loss) * (right.nbytes - left.nbytes)
    return across >= (right.loss - left.loss) * (middle.nbytes - left.nbytes)


def _complete(
    tensors: list[list[Option]], steps: _Steps, picked: list[int], limit_bytes: int
) -> tuple[float, list[int]]:
    """Loss and choice where the tensors after those `picked` take every step of the relaxation that still fits."""
    choice = picked + [0] * (len(tensors) - len(picked))
    left = limit_bytes - sum(options[index].nbytes for options, index in zip(tensors, choice, strict=True))
    for number, index in zip(steps.tensor.tolist(), steps.index.tolist(), strict=True):
        size = tensors[number][index].nbytes - tensors[number][choice[number]].nbytes
        if size <= left:
            choice[number] = index
            left -= size
    return sum(options[index].loss for options, index in zip(tensors, choice, strict=True)), choice


def _search(tensors: list[list[Option]], limit_bytes: int) -> tuple[list[int], float]:
    """The option's index of every tensor, and a lower bound on the loss of any choice."""
    best, choice = _complete(tensors, _steps(tensors, 0), [], limit_bytes)
    nbytes, loss, history = np.zeros(1), np.zeros(1), np.zeros((1, 0), np.uint8)
    dropped = np.inf
    for number, options in enumerate(tensors):
        sizes, losses = (np.array([getattr(option, what) for option in options]) for what in ("nbytes", "loss"))
        nbytes, loss = (nbytes[:, None] + sizes).ravel(), (loss[:, None] + losses).ravel()
        last = np.tile(np.arange(len(options), dtype=np.uint8), len(history))[:, None]
        history = np.hstack([np.repeat(history, len(options), axis=0), last])
        steps = _steps(tensors, number + 1)
        bound = loss + steps.bound(limit_bytes - nbytes)
        lowest = int(bound.argmin())
        best, choice = min((best, choice), _complete(tensors, steps, history[lowest].tolist(), limit_bytes))
        kept, lost = _promising(nbytes, loss, bound, best)
        dropped = min(dropped, lost)
        nbytes, loss, history = nbytes[kept], loss[kept], history[kept]
        if not len(kept):
            break
    return choice, min(best, dropped)


def _promising(nbytes: Floats, loss: Floats, bound: Floats, best: float) -> tuple[NDArray[np.int64], float]:
    """Indices of the partial choices to keep, and the lowest bound of those that are dropped for their bound."""
    order = np.lexsort((loss, nbytes))
    least = np.minimum.accumulate(loss[order])
    order = order[np.concatenate([[True], least[1:] < least[:-1]])]
    order = order[bound[order].argsort(kind="stable")]
    count = int((bound[order] < best * (1 - RELATIVE_GAP)).sum())
    kept, lost = order[: min(count, MOST_STATES)], order[min(count, MOST_STATES) :]
    return kept, float(bound[lost].min(initial=np.inf))
