"""Exact one-dimensional weighted k-means of each row, by dynamic programming over its sorted values.

In one dimension, the clusters of an optimal solution are intervals of the sorted values. So the best division into k
intervals follows from the best divisions of every prefix into k - 1 (Grønlund et al., arXiv 1701.07204). Prefix sums
give an interval's error in O(1). The start of the last interval moves right monotonically, so divide and conquer
computes a layer in O(n log n). The result is the global optimum; Lloyd's iteration only finds a local one.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray


@njit(cache=True, inline="always")
def _interval_cost(mass, first, second, i, j):
    """Returns the weighted squared error of values i..j-1 around their mean, from the prefix sums of s, s w and s w^2.

    w are the values and s their weights. The prefix sums are `mass`, `first` and `second`.
    """
    total = mass[j] - mass[i]
    if total <= 0:
        return 0.0
    moment = first[j] - first[i]
    return max(second[j] - second[i] - moment * moment / total, 0.0)


@njit(cache=True)
def _layer(previous, current, split, mass, first, second, n):
    """Adds one interval to the division of every prefix.

    current[j] becomes the least error of values 0..j-1 with one interval more than in `previous`, and split[j] becomes
    the start of the last interval.
    """
    stack = [(1, n, 0, n - 1)]
    while len(stack) > 0:
        low, high, least, most = stack.pop()
        if low > high:
            continue
        middle = (low + high) // 2
        best, where = np.inf, least
        for i in range(least, min(middle - 1, most) + 1):
            cost = previous[i] + _interval_cost(mass, first, second, i, middle)
            if cost < best:
                best, where = cost, i
        current[middle] = best
        split[middle] = where
        stack.append((low, middle - 1, least, where))
        stack.append((middle + 1, high, where, most))


@njit(cache=True)
def _row(values, weight, count, centers):
    """Writes the centers of one row and returns their error."""
    order = np.argsort(values)
    n = values.shape[0]
    shift = values[order[n // 2]]  # sums of distances from the median lose fewer digits
    mass, first, second = np.zeros(n + 1), np.zeros(n + 1), np.zeros(n + 1)
    for i in range(n):
        w, s = values[order[i]] - shift, weight[order[i]]
        mass[i + 1] = mass[i] + s
        first[i + 1] = first[i] + s * w
        second[i + 1] = second[i] + s * w * w
    splits = np.zeros((count, n + 1), np.int32)
    cost = np.full(n + 1, np.inf)
    cost[0] = 0.0
    following = np.empty(n + 1)
    for k in range(count):
        following[:] = np.inf
        following[0] = 0.0
        _layer(cost, following, splits[k], mass, first, second, n)
        cost, following = following, cost
    end = n
    for k in range(count - 1, -1, -1):
        begin = splits[k, end]
        total = mass[end] - mass[begin]
        if total > 0:
            centers[k] = shift + (first[end] - first[begin]) / total
        else:  # an empty interval, or one whose values have no weight
            centers[k] = values[order[min(begin, n - 1)]]
        end = begin
    return cost[n]


@njit(parallel=True, cache=True)
def _rows(values, weight, count, centers, errors):
    for r in prange(values.shape[0]):
        errors[r] = _row(values[r], weight[r % weight.shape[0]], count, centers[r])
        centers[r].sort()


def weighted_kmeans(
    values: NDArray[np.float64], weight: NDArray[np.float64], count: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Finds the `count` centers of each row that minimise sum_i weight_i (w_i - nearest center)^2.

    values [R, C]; weight [C] or [R, C], not negative. Returns the centers, [R, count], ascending, and the minima, [R].
    """
    centers = np.zeros((values.shape[0], count))
    errors = np.zeros(values.shape[0])
    _rows(np.ascontiguousarray(values), np.atleast_2d(np.ascontiguousarray(weight)), count, centers, errors)
    return centers, errors
