"""Compares exact weighted k-means with brute force and with scikit-learn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lqexport.kernels.kmeans import weighted_kmeans


def objective(values: np.ndarray, weight: np.ndarray, centers: np.ndarray) -> float:
    return float((weight * np.abs(values[:, None] - centers[None]).min(1) ** 2).sum())


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_best_of_all_splits(seed: int) -> None:
    draw = np.random.default_rng(seed)
    values, weight = draw.normal(size=9), draw.random(9) ** 3
    centers, errors = weighted_kmeans(values[None], weight, 3)
    order = np.argsort(values)
    best = np.inf
    for cuts in itertools.combinations(range(1, 9), 2):
        clusters = np.split(order, cuts)
        means = np.array([np.average(values[cluster], weights=weight[cluster]) for cluster in clusters])
        best = min(best, objective(values, weight, means))
    assert objective(values, weight, centers[0]) == pytest.approx(best)
    assert errors[0] == pytest.approx(best)


@pytest.mark.parametrize("count", [4, 8, 16])
def test_is_never_worse_than_lloyd(count: int) -> None:
    sklearn = pytest.importorskip("sklearn.cluster", reason="scikit-learn is in the test extra")
    draw = np.random.default_rng(count)
    values, weight = draw.standard_t(4, size=(4, 300)), draw.lognormal(0, 2, size=300)
    centers, errors = weighted_kmeans(values, weight, count)
    for row in range(4):
        lloyd = sklearn.KMeans(count, n_init=1, max_iter=100, random_state=0).fit(values[row][:, None], None, weight)
        assert errors[row] == pytest.approx(objective(values[row], weight, centers[row]), rel=1e-9)
        assert errors[row] <= lloyd.inertia_ * (1 + 1e-9)


def test_fewer_distinct_values_than_centers() -> None:
    values = np.array([[1.0, 1.0, 2.0, 2.0, 2.0]])
    centers, errors = weighted_kmeans(values, np.ones(5), 4)
    assert errors[0] == pytest.approx(0, abs=1e-12)
    assert {1.0, 2.0} <= set(centers[0])
    assert np.all(np.diff(centers[0]) >= 0)


def test_values_that_do_not_count() -> None:
    values = np.array([[0.0, 1.0, 50.0]])
    centers, errors = weighted_kmeans(values, np.array([1.0, 1.0, 0.0]), 2)
    assert errors[0] == 0
    np.testing.assert_allclose(centers[0], [0, 1])


def test_rows_may_have_their_own_weights() -> None:
    draw = np.random.default_rng(5)
    values, weight = draw.normal(size=(3, 40)), draw.random((3, 40))
    centers, _ = weighted_kmeans(values, weight, 4)
    for row in range(3):
        alone, _ = weighted_kmeans(values[row : row + 1], weight[row], 4)
        np.testing.assert_array_equal(centers[row], alone[0])
