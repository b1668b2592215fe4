"""Choosing types within a budget: compared with every possible choice, and at the sizes of real models."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lqexport.errors import UserError
from lqexport.pipeline import allocate as allocate_module
from lqexport.pipeline.allocate import RELATIVE_GAP, Allocation, Option, allocate, reachable

options = st.lists(
    st.builds(Option, st.text("ab", max_size=2), st.integers(0, 12), st.floats(0, 8, width=16)), min_size=1, max_size=4
)
problems = st.lists(options, min_size=1, max_size=5).map(
    lambda lists: {str(i): tensor_options for i, tensor_options in enumerate(lists)}
)


def model(count: int, types: int, seed: int) -> dict[str, list[Option]]:
    """Returns the options of tensors of a few million weights. The loss falls about fourfold with each bit."""
    draw = np.random.default_rng(seed)
    tensors = {}
    for number in range(count):
        weights, scale = int(draw.integers(1, 30)) << 18, draw.lognormal(0, 2)
        bits = np.sort(draw.uniform(2, 8, types))
        loss = scale * 4**-bits * draw.uniform(0.8, 1.2, types)
        tensors[f"t{number}"] = [
            Option(f"{b:.2f}", int(weights * b / 8), float(cost)) for b, cost in zip(bits, loss, strict=True)
        ]
    return tensors


def budget_at(tensors: dict[str, list[Option]], share: float) -> int:
    least, most = reachable(tensors)
    return int(least + share * (most - least))


def check(result: Allocation, tensors: dict[str, list[Option]], budget: int) -> None:
    assert list(result.chosen) == list(tensors)
    assert all(option in tensors[name] for name, option in result.chosen.items())
    assert result.nbytes == sum(option.nbytes for option in result.chosen.values()) <= budget
    assert result.loss == pytest.approx(sum(option.loss for option in result.chosen.values()))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(tensors=problems, share=st.floats(0, 1))
def test_no_choice_within_the_budget_is_better_by_more_than_the_gap(
    tensors: dict[str, list[Option]], share: float
) -> None:
    budget = budget_at(tensors, share)
    result = allocate(tensors, budget)
    check(result, tensors, budget)
    least = min(
        sum(option.loss for option in choice)
        for choice in itertools.product(*tensors.values())
        if sum(option.nbytes for option in choice) <= budget
    )
    assert least <= result.loss <= least + result.gap + 1e-12
    assert result.gap <= RELATIVE_GAP * result.loss + 1e-12


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.7, 0.98, 1.0])
@pytest.mark.parametrize(("count", "types"), [(14, 8), (210, 12), (560, 16)])
def test_models_are_solved_to_a_small_gap(count: int, types: int, share: float) -> None:
    tensors = model(count, types, seed=count)
    budget = budget_at(tensors, share)
    result = allocate(tensors, budget)
    check(result, tensors, budget)
    assert result.gap <= RELATIVE_GAP * result.loss * (1 + 1e-9)
    assert result == allocate(tensors, budget)


def test_where_partial_choices_are_dropped_the_gap_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = model(12, 6, seed=0)
    for options in tensors.values():  # equal slopes: nearly every choice is as good as another
        options[:] = [Option(option.name, option.nbytes, 1e8 - option.nbytes * (1 + i / 1e4)) for i, option in
                      enumerate(options)]  # fmt: skip
    budget = budget_at(tensors, 0.37)
    monkeypatch.setattr(allocate_module, "RELATIVE_GAP", 0.0)
    exact = allocate(tensors, budget)
    monkeypatch.setattr(allocate_module, "MOST_STATES", 3)
    rough = allocate(tensors, budget)
    check(rough, tensors, budget)
    assert rough.loss - rough.gap <= exact.loss <= rough.loss
    assert rough.gap > 0


def test_more_bytes_never_cost_more() -> None:
    tensors = model(30, 6, seed=1)
    losses = [allocate(tensors, budget_at(tensors, share)).loss for share in np.linspace(0, 1, 12)]
    assert all(after <= before * (1 + RELATIVE_GAP) for before, after in itertools.pairwise(losses))


def test_impossible_budgets_name_what_can_be_reached() -> None:
    tensors = {"a": [Option("x", 5, 1.0), Option("y", 9, 0.5)], "b": [Option("x", 2, 1.0)]}
    with pytest.raises(UserError, match="from 7 to 11 bytes"):
        allocate(tensors, 6)
    assert allocate(tensors, 7).nbytes == 7
    assert allocate(tensors, 10**9).chosen["a"].name == "y"


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -1.0])
def test_a_loss_that_is_no_number_is_refused(loss: float) -> None:
    with pytest.raises(ValueError, match="a: the predicted loss of x"):
        allocate({"a": [Option("x", 1, loss)]}, 10)
