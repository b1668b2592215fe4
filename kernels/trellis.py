"""Searches the walk of a trellis that is nearest to a tile of weights, compiled for the CPU with numba.

The search is Viterbi's, over all 65536 states of every position. Between positions i and i + 1, what a walk has been
matters only by its node, the low 16 - D(i + 1) bits of state(i) (`formats.trellis`). Each node keeps the least cost of
all walks that lead to it.

A walk must end in the node that it began in. So a first pass goes over the 64 positions on both sides of the seam, with
free ends, and finds the node before the first position. A second one goes around the whole ring from there to there.

Costs are integers of 16 bits, so that a vector instruction takes as many states as it can: 0.05 per cent of the error
is lost to that (`tests/test_exl3_search.py`). A step's costs count from the least of them. For a node the loop adds the
squared difference of each state's value from the target to the cost of the node before it, and takes the least.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from lqexport.kernels.sixteen import difference, lesser, product, signed_product, signed_sum, sum_of

NEVER = np.uint16(65535)
"""The cost of a node that no walk leads to."""
LARGEST = 27500
"""The largest magnitude of a state's value, as an int16. Targets may be 1.19 times as large before they are cut off."""
RUN = 8192
"""States that a loop takes at once: two arrays of them stay in the first cache."""
POSITIONS = 256
APPROACH = 64
"""Positions on each side of the seam that the first pass goes over. With all 128, the error is 0.4 to 0.8 per cent
smaller at 1 to 4 bits, and 0.05 to 0.25 after two sweeps, which close walks elsewhere. The search takes a third longer.
"""
_TWICE = np.uint32(0x10001)
_FOUR_TIMES = np.uint64(0x0001000100010001)


class Form(NamedTuple):
    """A trellis as the loops need it.

    values     int16 [65536], the value of each state, scaled so that the largest is LARGEST
    unit       the int16 for a value of 1
    new_bits   int64 [256], the bits that each position takes
    doublings  int16, how often a difference is doubled before it is squared, so that small errors count: 0, 1, 3 or 5
    limit      int16, the largest difference that may be doubled so often; the errors of larger ones are alike
    """

    values: NDArray[np.int16]
    unit: float
    new_bits: NDArray[np.int64]
    doublings: np.int16
    limit: np.int16


class Rooms(NamedTuple):
    """Work space, one part for each thread.

    costs   uint16 [threads, 257, nodes], the cost of each node before each position and after the last
    wide    uint64 [threads, RUN / 4], the costs of the nodes before some states
    """

    costs: NDArray[np.uint16]
    wide: NDArray[np.uint64]


def form_of(table: NDArray[np.float32], new_bits: NDArray[np.int64]) -> Form:
    """Returns a trellis as the loops need it, from its values float32 [65536] and its bits int64 [256]."""
    unit, bits = float(LARGEST / np.abs(table).max()), int(new_bits.sum()) // POSITIONS
    doublings = (bits - 3) | 1 if bits > 3 else 0  # `_error` knows 0, 1, 3 and 5
    values = np.rint(table * unit).astype(np.int16)
    return Form(values, unit, new_bits, np.int16(doublings), np.int16(32767 >> doublings))


def rooms_for(form: Form, threads: int) -> Rooms:
    """Returns work space for some threads: 8 MB for each at 2 bits per weight, and the half with every further bit."""
    nodes = 1 << (16 - int(form.new_bits.min()))
    costs = np.empty((threads, POSITIONS + 1, nodes), np.uint16)
    return Rooms(costs, np.empty((threads, RUN // 4), np.uint64))


@njit(cache=True)
def _expand(costs, bits, twice, four_times):
    """Writes the cost of each node 2^bits times in a row; `twice` and `four_times` are views of one array."""
    if bits == 1:
        for n in range(costs.shape[0]):
            twice[n] = np.uint32(costs[n]) * _TWICE
    elif bits == 2:
        for n in range(costs.shape[0]):
            four_times[n] = np.uint64(costs[n]) * _FOUR_TIMES
    elif bits == 3:
        for n in range(costs.shape[0]):
            four = np.uint64(costs[n]) * _FOUR_TIMES
            four_times[2 * n] = four
            four_times[2 * n + 1] = four
    elif bits == 4:
        for n in range(costs.shape[0]):
            four = np.uint64(costs[n]) * _FOUR_TIMES
            for i in range(4):
                four_times[4 * n + i] = four
    else:
        for n in range(costs.shape[0]):
            four = np.uint64(costs[n]) * _FOUR_TIMES
            for eight in range(n << (bits - 5), (n + 1) << (bits - 5)):
                for i in range(8):
                    four_times[8 * eight + i] = four


@njit(cache=True, inline="always")
def _error(value, target, weight, doublings):
    """Returns the weighted squared difference of a state's value from the target, uint16.

    The compiler makes a loop of its own for each number of doublings, since it is the same for all states.
    """
    error = difference(value, target)
    if doublings >= 1:
        error = signed_sum(error, error)
    if doublings >= 3:
        error = signed_sum(error, error)
        error = signed_sum(error, error)
    if doublings >= 5:
        error = signed_sum(error, error)
        error = signed_sum(error, error)
    return product(signed_product(error, error), weight)


@njit(cache=True)
def _add_errors(values, target, weight, doublings, costs):
    """Adds the errors of states to their costs."""
    for n in range(costs.shape[0]):
        costs[n] = sum_of(costs[n], _error(values[n], target, weight, doublings))


@njit(cache=True)
def _take_lesser(costs, others):
    for n in range(costs.shape[0]):
        costs[n] = lesser(costs[n], others[n])


@njit(cache=True)
def _count_from_least(costs):
    """Subtracts the least cost from all others."""
    least = NEVER
    for n in range(costs.shape[0]):
        least = lesser(least, costs[n])
    for n in range(costs.shape[0]):
        cost = costs[n]
        costs[n] = cost if cost == NEVER else np.uint16(cost - least)


@njit(cache=True)
def _step(before, form, position, target, weight, after, wide):
    """Writes the costs of the nodes after a position from those of the nodes before it."""
    here, there = form.new_bits[position], form.new_bits[(position + 1) % POSITIONS]
    nodes, costs, twice = 1 << (16 - there), wide.view(np.uint16), wide.view(np.uint32)
    after = after[:nodes]
    after[:] = NEVER
    for first in range(0, 1 << 16, RUN):  # the state k * nodes + n leads to node n
        _expand(before[first >> here : (first + RUN) >> here], here, twice, wide)
        _add_errors(form.values[first : first + RUN], target, weight, form.doublings, costs)
        width, start = RUN, first % nodes
        while width > nodes:
            width >>= 1
            _take_lesser(costs[:width], costs[width : 2 * width])
        _take_lesser(after[start : start + width], costs[:width])
    _count_from_least(after)


@njit(cache=True)
def _state_before(before, form, position, target, weight, node):
    """Returns the state at a position of the best walk to a node after it."""
    here, there = form.new_bits[position], form.new_bits[(position + 1) % POSITIONS]
    best, least = node, np.int64(NEVER) + 1
    for k in range(1 << there):
        state = (k << (16 - there)) + node
        cost = sum_of(before[state >> here], _error(form.values[state], target, weight, form.doublings))
        if cost < least:
            best, least = state, np.int64(cost)
    return best


@njit(cache=True)
def _seam(targets, weights, form, begin, costs, wide):
    """Returns the node before position `begin` of the best walk over the positions around it."""
    start, end = begin + POSITIONS - APPROACH, 2 * APPROACH
    costs[0] = 0
    for step in range(end):  # nobody asks for the costs of the first half again, which take turns in two rows
        row = step if step >= APPROACH else step % 2
        following = step + 1 if step + 1 >= APPROACH else (step + 1) % 2
        position = (start + step) % POSITIONS
        _step(costs[row], form, position, targets[position], weights[position], costs[following], wide)
    node = np.argmin(costs[end, : 1 << (16 - form.new_bits[(start + end) % POSITIONS])])
    for step in range(end - 1, APPROACH - 1, -1):
        position = (start + step) % POSITIONS
        state = _state_before(costs[step], form, position, targets[position], weights[position], node)
        node = state >> form.new_bits[position]
    return node


@njit(cache=True)
def _closed(targets, weights, form, begin, seam, costs, wide, states):
    """Writes the best walk that begins and ends in node `seam` before position `begin`. Returns whether it found one.

    It may find none where the costs of all such walks are too large for 16 bits.
    """
    costs[0] = NEVER
    costs[0, seam] = 0
    for step in range(POSITIONS):
        position = (begin + step) % POSITIONS
        _step(costs[step], form, position, targets[position], weights[position], costs[step + 1], wide)
    node = seam
    for step in range(POSITIONS - 1, -1, -1):
        position = (begin + step) % POSITIONS
        state = _state_before(costs[step], form, position, targets[position], weights[position], node)
        states[position] = state
        node = state >> form.new_bits[position]
    return node == seam


@njit(cache=True)
def _search(targets, weights, form, begin, again, costs, wide, states):
    """Does what `search` does to one tile."""
    if again:
        last = np.int64(states[(begin + POSITIONS - 1) % POSITIONS])
        seam = last & ((1 << (16 - form.new_bits[begin])) - 1)
    else:
        seam = _seam(targets, weights, form, begin, costs, wide)
    if not _closed(targets, weights, form, begin, seam, costs, wide, states):
        _closed(targets, np.zeros_like(weights), form, begin, seam, costs, wide, states)  # any walk will do


@njit(parallel=True, cache=True)
def search(targets, weights, form, begin, again, rooms, states):
    """Searches the walk of least weighted squared error for each tile.

    targets   float32 [T, 256], in the order of the positions, in units of the states' values
    weights   float32 [256], of each position's squared error, above 0
    begin     the position, 0 to 255, at which walks are closed
    again     whether `states` hold walks, whose nodes before `begin` stay
    states    uint16 [T, 256], written
    """
    threads, scale = rooms.wide.shape[0], np.float32(65535) / weights.max()
    whole = (weights * scale).astype(np.uint16)
    for thread in prange(threads):
        target = np.empty(POSITIONS, np.int16)
        for t in range(thread, targets.shape[0], threads):
            for i in range(POSITIONS):
                target[i] = np.int16(min(max(np.rint(targets[t, i] * form.unit), -32767.0), 32767.0))
            _search(target, whole, form, begin, again, rooms.costs[thread], rooms.wide[thread], states[t])
