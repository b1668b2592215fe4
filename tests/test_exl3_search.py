"""The search of walks through a trellis, compared with Viterbi's algorithm in float64."""

from __future__ import annotations

import numpy as np
import pytest

from lqexport.formats.exl3 import EXL3
from lqexport.formats.trellis import Trellis
from lqexport.kernels import trellis

WEIGHTS = np.random.default_rng(1).uniform(0.4, 1, 256).astype(np.float32)


def searched(codec_name: str, targets: np.ndarray, threads: int = 1) -> tuple[Trellis, np.ndarray, trellis.Form]:
    """Returns the trellis of a codec and the states that the search finds for targets [T, 256]."""
    codec_trellis = EXL3[codec_name].trellis
    form = trellis.form_of(codec_trellis.table, codec_trellis.new_bits)
    states = np.empty(targets.shape, np.uint16)
    trellis.search(targets, WEIGHTS, form, 0, False, trellis.rooms_for(form, threads), states)
    return codec_trellis, states, form


def targets_of(count: int) -> np.ndarray:
    return np.random.default_rng(2).normal(0, 0.95, (count, 256)).astype(np.float32).clip(-3.5, 3.5)


def losses(codec_trellis: Trellis, targets: np.ndarray, states: np.ndarray) -> np.ndarray:
    return (WEIGHTS * (codec_trellis.table[states].astype(np.float64) - targets) ** 2).sum(1)


def least_loss(codec_trellis: Trellis, target: np.ndarray, seam: int) -> float:
    """Returns the least loss of all walks that begin and end in a node, in float64."""
    bits, costs = codec_trellis.new_bits, np.full(1 << (16 - codec_trellis.new_bits[0]), np.inf)
    costs[seam] = 0
    for position in range(256):
        error = WEIGHTS[position] * (codec_trellis.table.astype(np.float64) - target[position]) ** 2
        of_states = np.repeat(costs, 1 << bits[position]) + error
        costs = of_states.reshape(1 << bits[(position + 1) % 256], -1).min(0)
    return float(costs[seam])


@pytest.mark.parametrize("name", ["exl3:1", "exl3:2", "exl3:3.5", "exl3:5", "exl3:8"])
def test_no_walk_through_the_same_node_is_better(name: str) -> None:
    targets = targets_of(1)
    codec_trellis, states, _ = searched(name, targets)
    assert codec_trellis.walks(states).all()
    seam = int(states[0, -1]) & ((1 << (16 - codec_trellis.new_bits[0])) - 1)
    least = least_loss(codec_trellis, targets[0], seam)
    assert losses(codec_trellis, targets, states)[0] == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize(("name", "expected"), [("exl3:2", 0.0684), ("exl3:4", 0.00442)])
def test_the_error_of_gaussian_weights_is_the_formats(name: str, expected: float) -> None:
    """ExLlamaV3's own search leaves these errors of Gaussian weights of deviation 1."""
    targets = targets_of(12)
    codec_trellis, states, _ = searched(name, targets)
    error = losses(codec_trellis, targets, states).mean() / WEIGHTS.sum() / 0.95**2
    assert error == pytest.approx(expected, rel=0.04)


def test_a_second_search_from_the_other_side_loses_nothing() -> None:
    targets = targets_of(6)
    codec_trellis, states, form = searched("exl3:2", targets)
    again = states.copy()
    trellis.search(targets, WEIGHTS, form, 128, True, trellis.rooms_for(form, 1), again)
    assert codec_trellis.walks(again).all()
    before, after = (losses(codec_trellis, targets, each) for each in (states, again))
    assert np.all(after <= before * (1 + 1e-4))
    assert np.any(after < before * (1 - 1e-3))


def test_the_number_of_threads_changes_nothing() -> None:
    targets = targets_of(5)
    assert np.array_equal(searched("exl3:4", targets)[1], searched("exl3:4", targets, threads=3)[1])


@pytest.mark.parametrize("name", ["exl3:1", "exl3:2.5", "exl3:4", "exl3:8"])
def test_any_targets_have_a_walk(name: str) -> None:
    draw = np.random.default_rng(3)
    targets = np.concatenate([draw.normal(0, 50, (1, 256)), np.full((1, 256), 1e30), np.zeros((1, 256))])
    codec_trellis, states, _ = searched(name, targets.astype(np.float32))
    assert codec_trellis.walks(states).all()


def test_a_node_that_costs_too_much_is_reached_all_the_same() -> None:
    """16 forced positions cost more than 16 bits hold, where errors are doubled until most count as the largest."""
    codec_trellis, states, form = searched("exl3:1", targets_of(1))
    coarse = form._replace(doublings=np.int16(5), limit=np.int16(1023))
    targets, rooms, ones = -codec_trellis.table[states], trellis.rooms_for(form, 1), np.ones(256, np.float32)
    trellis.search(targets, ones, coarse, 0, True, rooms, states)
    states[0, -1] = np.flatnonzero(rooms.costs[0, -1] == trellis.NEVER)[-1]
    again = states.copy()
    trellis.search(targets, ones, coarse, 0, True, rooms, again)
    assert codec_trellis.walks(again).all()
    assert (again[0, -1] ^ states[0, -1]) & 0x7FFF == 0
