"""The k-means kernel, compared with `kernels.kmeans`. It runs on the CPU, and on a GPU by `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lqexport.formats.registry import codec_named
from lqexport.grids import fit
from lqexport.kernels import cuda, cuda_kmeans
from lqexport.kernels.kmeans import weighted_kmeans

KernelsOn = Callable[[str, dict[str, list[str]]], str]
BUILD = {cuda_kmeans.SOURCE: [cuda_kmeans.KERNEL]}


@pytest.fixture(params=["plain", "address", "thread", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, kernels_on: KernelsOn) -> str:
    return kernels_on(request.param, BUILD)


@pytest.fixture(params=["plain", pytest.param("gpu", marks=pytest.mark.gpu)])
def plain_device(request: pytest.FixtureRequest, kernels_on: KernelsOn) -> str:
    return kernels_on(request.param, BUILD)


def problem(rows: int, columns: int, weights_per_row: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns values far from zero, and weights that differ widely in size."""
    generator = torch.Generator().manual_seed(columns)
    values = torch.randn(rows, columns, generator=generator, dtype=torch.float64) + 3
    shape = (rows, columns) if weights_per_row else (columns,)
    return values, torch.randn(shape, generator=generator, dtype=torch.float64).mul(2).exp()


def check(values: torch.Tensor, weight: torch.Tensor, count: int, device: str, *, distinct: bool = True) -> None:
    centers, errors = (torch.from_numpy(part) for part in weighted_kmeans(values.numpy(), weight.numpy(), count))
    on_device, actual_errors = cuda_kmeans.weighted_kmeans(values.to(device), weight.to(device), count)
    scale = float(errors.max()) + 1e-3
    torch.testing.assert_close(actual_errors.cpu(), errors, rtol=1e-9, atol=1e-10 * scale)
    off = (values[:, :, None] - on_device.cpu()[:, None]).abs().amin(2)
    torch.testing.assert_close((weight * off.square()).sum(1), errors, rtol=1e-6, atol=1e-9 * scale)
    assert bool((on_device.diff(dim=1) >= 0).all())
    if distinct:  # the order of equal values depends on the sort, and so do the splits between them
        torch.testing.assert_close(on_device.cpu(), centers, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("count", [4, 8, 16])
def test_centers_are_those_of_the_cpu(count: int, plain_device: str) -> None:
    """Covers fewer candidates than threads (one warp for each), and more (one thread for each)."""
    for columns in (17, 64, 300, 1100):
        check(*problem(3, columns), count, plain_device)


def test_as_few_values_as_centers_and_fewer(device: str) -> None:
    for columns in (1, 2, 3, 4, 5):
        check(*problem(2, columns), 4, device, distinct=columns >= 4)


def test_rows_with_weights_of_their_own(device: str) -> None:
    check(*problem(2, 45, weights_per_row=True), 4, device)


def test_equal_values_and_values_that_do_not_count(device: str) -> None:
    values, weight = problem(2, 600)
    weight[::3] = 0
    check((values * 4).round() / 4, weight, 4, device, distinct=False)
    check(torch.ones(1, 40, dtype=torch.float64), torch.ones(40, dtype=torch.float64), 4, device, distinct=False)
    check(torch.ones(1, 9, dtype=torch.float64), torch.zeros(9, dtype=torch.float64), 4, device, distinct=False)


def test_rows_are_worked_on_in_parts(plain_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kmeans, "CHUNK", 90)
    check(*problem(5, 45, weights_per_row=True), 4, plain_device)


@pytest.mark.parametrize("name", ["native:table-2", "native:table-4"])
def test_a_table_is_fitted_as_on_the_cpu(name: str, plain_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, importance = (part.float() for part in problem(3, 200))
    expected = fit.fit(codec_named(name), weights, importance).levels
    monkeypatch.setattr(cuda, "usable", lambda _: True)
    actual = fit.fit(codec_named(name), weights.to(plain_device), importance.to(plain_device)).levels
    torch.testing.assert_close(actual.cpu(), expected, rtol=2**-10, atol=0)


@pytest.mark.gpu
def test_a_large_matrix_on_a_gpu(kernels_on: KernelsOn) -> None:
    check(*problem(700, 4096), 16, kernels_on("gpu", {}))
