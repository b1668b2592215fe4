"""The kernels for formats with a codebook, compared with `kernels.vectors`. They run on the CPU, and on a GPU by
`pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch

from lqexport.formats.codebook import Codebook
from lqexport.formats.gguf_vectors import GGUF_VECTORS
from lqexport.formats.registry import codec_named
from lqexport.grids import vectors as grids
from lqexport.grids.grid import Numbers, TensorGrid
from lqexport.kernels import cuda, cuda_vectors
from lqexport.solver import feedback
from lqexport.solver.cholesky import factorize
from lqexport.solver.linear import unit_of

KernelsOn = Callable[[str, dict[str, list[str]]], str]
Solved = tuple[torch.Tensor, TensorGrid, torch.Tensor]
KERNELS = {cuda_vectors.SOURCE: cuda_vectors.KERNELS}
NAMES = [codec.name for codec in GGUF_VECTORS]


@cache
def problem(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns weights, and the Hessian of correlated inputs."""
    draw = torch.Generator().manual_seed(columns)
    mixing = torch.randn(columns, columns, generator=draw) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(2 * columns, columns, generator=draw) @ mixing * torch.rand(columns, generator=draw)
    return torch.randn(rows, columns, generator=draw), inputs.T @ inputs / len(inputs)


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """A function that says whether the CUDA kernels solve, on whatever device the tensors are."""
    yield lambda used: monkeypatch.setattr(cuda, "usable", lambda _: used)
    grids.book_on.cache_clear()


@pytest.fixture(params=["plain", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, kernels_on: KernelsOn) -> str:
    return kernels_on(request.param, KERNELS)


def search(name: str, rows: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the scales of a row's groups, and by how much an error of each counts."""
    codec, (weights, hessian) = codec_named(name), problem(rows, 256)
    importance = hessian.diagonal().unflatten(0, (-1, codec.scale.group))
    importance = importance / importance.sum(1, keepdim=True)
    return grids.search_vectors(codec, weights.to(device), importance.to(device))


def solved(name: str, rows: int, device: str) -> Solved:
    """Returns the codes of error feedback on a grid of simple scales, and grid and codes after a sweep of descent."""
    codec, (weights, hessian) = codec_named(name), problem(rows, 256)
    cholesky = factorize(hessian.double(), 0.05, True, unit=unit_of([name]))
    form = codec.scale
    supers = weights.abs().amax(1, keepdim=True).half().float() / (form.high * float(codec.levels[-1]))
    subs = torch.full((rows, 256 // form.group), form.high - 4, dtype=torch.int16)
    numbers = Numbers(form, supers.half().float().to(device), subs.to(device))
    levels = torch.from_numpy(codec.levels)[None].to(device)
    grid = TensorGrid(256, levels, False, numbers, codebook=codec.codebook)
    codes = feedback.feedback(weights.to(device), grid, cholesky.to(device) if device != "cpu" else cholesky)
    damped = feedback.damped(hessian, 0.05).to(device)
    return codes.cpu(), *feedback.refine(weights.to(device), damped, grid, codes, sweeps=1, refit=True)


def loss(grid: TensorGrid, codes: torch.Tensor, rows: int) -> float:
    weights, hessian = problem(rows, 256)
    return feedback.layer_loss((grid.values(codes).cpu() - weights).double(), hessian.double())


@pytest.mark.parametrize("name", NAMES)
def test_codes_and_numbers_are_those_of_the_cpu(name: str, device: str, by_kernels: Callable[[bool], None]) -> None:
    by_kernels(False)
    first, grid, codes = solved(name, 5, "cpu")
    by_kernels(True)
    cuda_first, cuda_grid, cuda_codes = solved(name, 5, device)
    feedback_limit, refined_limit = (0, 2e-3) if device == "cpu" else (2e-2, 2e-2)  # as in test_cuda_solve.py
    assert float((first != cuda_first).float().mean()) <= feedback_limit
    assert float((codes != cuda_codes.cpu()).float().mean()) <= refined_limit
    assert loss(cuda_grid, cuda_codes, 5) == pytest.approx(loss(grid, codes, 5), rel=1e-3)
    assert loss(grid, codes, 5) < loss(grid, first, 5)


@pytest.mark.parametrize("name", ["gguf:IQ1_S", "gguf:IQ1_M", "gguf:IQ2_XXS", "gguf:IQ3_S"])
def test_fitted_scales_are_those_of_the_cpu(name: str, device: str, by_kernels: Callable[[bool], None]) -> None:
    by_kernels(False)
    expected = search(name, 3, "cpu")
    by_kernels(True)
    for actual, wanted in zip(search(name, 3, device), expected, strict=True):
        torch.testing.assert_close(actual.cpu(), wanted, rtol=0 if device == "cpu" else 1e-4, atol=0)


@pytest.mark.parametrize("flavour", ["address", "thread"])
def test_under_the_sanitizers(flavour: str, kernels_on: KernelsOn, by_kernels: Callable[[bool], None]) -> None:
    device = kernels_on(flavour, KERNELS)
    by_kernels(True)
    for name in ("gguf:IQ1_S", "gguf:IQ3_XXS"):
        solved(name, 2, device)
        search(name, 1, device)


def test_what_a_kernel_cannot_hold_is_refused(by_kernels: Callable[[bool], None]) -> None:
    codec = codec_named("gguf:IQ2_XS")
    book = grids.book_on(torch.device("cpu"), codec.codebook, codec.levels.tobytes())
    with pytest.raises(ValueError, match="at most 128 columns, not 136"):
        cuda_vectors.feedback_block(*torch.zeros(6, 1, 136), book)
    wide = Codebook(24, torch.cartesian_prod(*[torch.arange(12, 24, dtype=torch.uint8)] * 4).numpy())
    levels = torch.arange(24, dtype=torch.float32).numpy().tobytes()
    with pytest.raises(ValueError, match="at most 96 first halves of vectors, not 144"):
        grids.book_on(torch.device("cpu"), wide, levels)
