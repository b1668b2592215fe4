"""Chooses one option for every tensor, so that the predicted loss is least within a number of bytes.

This is the multiple-choice knapsack problem: exactly one option for every tensor, the least sum of losses, and a sum of
bytes that is at most the limit. The search goes tensor by tensor and keeps the partial choices that may still lead to
the best whole choice. It drops a partial choice if another one has fewer bytes and less loss. It also drops one whose
bound is above the loss of a whole choice that is known. The bound comes from the linear (= Lagrangian) relaxation, in
which the remaining tensors may mix their options in any shares. All arithmetic has a fixed order, so equal input gives
the equal choice on any machine.

Example: tensors a and b have options of 1 byte (losses 5 and 3) and 2 bytes (losses 1 and 2). Within 3 bytes, a takes 2
bytes and b takes 1, with loss 1 + 3 = 4; the other way round would lose 5 + 2 = 7.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lqexport.errors import UserError

RELATIVE_GAP = 1e-4
"""Partial choices that could lower the loss by less than this share are dropped: predictions are far less exact."""
MOST_STATES = 20_000
"""Largest number of partial choices that are kept, those of the lowest bounds. `gap` says what that may cost."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Option:
    """One way to store a tensor.

    name     such as the name of a codec
    nbytes   bytes of the stored tensor
    loss     predicted loss, in any unit that is the same for all tensors, since losses are added
    """

    name: str
    nbytes: int
    loss: float


@dataclass(frozen=True)
class Allocation:
    """A choice of options.

    chosen   one option for every tensor, by name
    nbytes   the sum of their bytes
    loss     the sum of their losses
    gap      how much lower the loss of another choice within the limit can be at most
    """

    chosen: dict[str, Option]
    nbytes: int
    loss: float
    gap: float


def reachable(tensors: Mapping[str, Sequence[Option]]) -> tuple[int, int]:
    """Returns the fewest and the most bytes that any choice takes."""
    sizes = [[option.nbytes for option in options] for options in tensors.values()]
    return sum(map(min, sizes)), sum(map(max, sizes))


def allocate(tensors: Mapping[str, Sequence[Option]], limit_bytes: int) -> Allocation:
    """Returns the options that make the sum of losses least within `limit_bytes`.

    Raises UserError if even the smallest options take more, naming the sizes that can be reached. Raises ValueError for
    an option whose loss is negative or not finite.
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
    """Returns the options that no other beats in both bytes and loss, by rising bytes and falling loss."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.nbytes, option.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


@dataclass(frozen=True)
class _Steps:
    """The linear relaxation of some tensors.

    It starts at the smallest options and takes n steps along the lower convex hulls of the tensors, the steepest first.

    bytes_used, loss   the sums after each number of steps, [n + 1]
    tensor, index      the tensor that each step is of, and the option that it leads to, [n]
    """

    bytes_used: Floats
    loss: Floats
    tensor: NDArray[np.int64]
    index: NDArray[np.int64]

    def bound(self, limit_bytes: Floats) -> Floats:
        """Returns the least relaxed loss of these tensors within each number of bytes; infinite if no choice fits."""
        return np.where(limit_bytes < self.bytes_used[0], np.inf, np.interp(limit_bytes, self.bytes_used, self.loss))


def _steps(tensors: list[list[Option]], first: int) -> _Steps:
    """Returns the relaxation of all tensors from number `first` on."""
    rows = []
    for number, options in enumerate(tensors[first:], first):
        hull = _hull(options)
        for before, after in itertools.pairwise(hull):
            size, gain = options[after].nbytes - options[before].nbytes, options[before].loss - options[after].loss
            rows.append((-gain / size, number, after, size, gain))
    table = np.array(sorted(rows)).reshape(-1, 5)
    start = [sum(getattr(options[0], figure) for options in tensors[first:]) for figure in ("nbytes", "loss")]
    sums = np.cumsum(np.concatenate([[start], table[:, 3:] * [1, -1]]), axis=0)
    return _Steps(sums[:, 0], sums[:, 1], table[:, 1].astype(np.int64), table[:, 2].astype(np.int64))


def _hull(options: list[Option]) -> list[int]:
    """Returns the indices of the options on the lower convex hull of loss over bytes."""
    hull: list[int] = []
    for index, option in enumerate(options):
        while len(hull) > 1 and _above(options[hull[-2]], options[hull[-1]], option):
            hull.pop()
        hull.append(index)
    return hull


def _above(left: Option, middle: Option, right: Option) -> bool:
    """Returns whether the middle option lies on or above the line through the other two."""
    across = (middle.loss - left.loss) * (right.nbytes - left.nbytes)
    return across >= (right.loss - left.loss) * (middle.nbytes - left.nbytes)


def _complete(
    tensors: list[list[Option]], steps: _Steps, picked: list[int], limit_bytes: int
) -> tuple[float, list[int]]:
    """Returns loss and choice if the tensors after those `picked` take every step of the relaxation that still fits."""
    choice = picked + [0] * (len(tensors) - len(picked))
    left = limit_bytes - sum(options[index].nbytes for options, index in zip(tensors, choice, strict=True))
    for number, index in zip(steps.tensor.tolist(), steps.index.tolist(), strict=True):
        size = tensors[number][index].nbytes - tensors[number][choice[number]].nbytes
        if size <= left:
            choice[number] = index
            left -= size
    return sum(options[index].loss for options, index in zip(tensors, choice, strict=True)), choice


def _search(tensors: list[list[Option]], limit_bytes: int) -> tuple[list[int], float]:
    """Returns the index of every tensor's option, and a lower bound on the loss of any choice."""
    best, choice = _complete(tensors, _steps(tensors, 0), [], limit_bytes)
    nbytes, loss, history = np.zeros(1), np.zeros(1), np.zeros((1, 0), np.uint8)
    dropped = np.inf
    for number, options in enumerate(tensors):
        sizes, losses = (np.array([getattr(option, figure) for option in options]) for figure in ("nbytes", "loss"))
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
    """Returns the indices of the partial choices to keep, and the lowest bound of those dropped for their bound."""
    order = np.lexsort((loss, nbytes))
    least = np.minimum.accumulate(loss[order])
    order = order[np.concatenate([[True], least[1:] < least[:-1]])]
    order = order[bound[order].argsort(kind="stable")]
    count = int((bound[order] < best * (1 - RELATIVE_GAP)).sum())
    kept, lost = order[: min(count, MOST_STATES)], order[min(count, MOST_STATES) :]
    return kept, float(bound[lost].min(initial=np.inf))
