"""The solver on formats with a codebook: vectors of codes are searched, fed back and refined, eight columns at once."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from lqexport.converters.gguf import writer as gguf
from lqexport.converters.gguf.reader import GGUFModel
from lqexport.evaluation import llamacpp_quantizer
from lqexport.formats.codebook import EIGHT
from lqexport.formats.gguf_vectors import GGUF_VECTORS
from lqexport.formats.registry import codec_named
from lqexport.grids.fit import fit
from lqexport.grids.grid import TensorGrid
from lqexport.grids.vectors import book
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe, SolverSettings
from lqexport.solver import feedback as solve
from lqexport.solver import solve_vectors
from lqexport.solver.cholesky import CholeskyFactor, factorize
from lqexport.solver.linear import solve_linear, unit_of
from lqexport.storage.artifact import Artifact, values_of
from lqexport.verification.verifying import verify

NAMES = [codec.name for codec in GGUF_VECTORS]
every_type = pytest.mark.parametrize("name", NAMES)
Problem = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def problem() -> Problem:
    """Weights [8, 512], and the Hessian of correlated inputs that differ in size."""
    draw = torch.Generator().manual_seed(1)
    mixing = torch.randn(512, 512, generator=draw) / 16 + torch.eye(512)
    inputs = torch.randn(1024, 512, generator=draw) @ mixing * torch.rand(512, generator=draw)
    return torch.randn(8, 512, generator=draw), inputs.T @ inputs / 1024


def solved(name: str, problem: Problem) -> tuple[TensorGrid, torch.Tensor, CholeskyFactor]:
    weights, hessian = problem
    cholesky = factorize(hessian, 0.01, True, unit=unit_of([name]))
    grid = fit(codec_named(name), weights, hessian.diagonal())
    return grid, solve.feedback(weights, grid, cholesky), cholesky


def loss(grid: TensorGrid, codes: torch.Tensor, problem: Problem) -> float:
    return solve.layer_loss((grid.values(codes) - problem[0]).double(), problem[1].double())


@every_type
def test_feedback_and_descent_lower_the_loss_of_rounding(name: str, problem: Problem) -> None:
    weights, damped = problem[0], solve.damped(problem[1], 0.01)
    grid, codes, _ = solved(name, problem)
    assert loss(grid, codes, problem) < 0.85 * loss(grid, grid.nearest(weights), problem)
    for refit in (False, True):
        losses = [loss(grid, codes, (weights, damped))]
        for _ in range(2):
            grid, codes = solve.refine(weights, damped, grid, codes, sweeps=1, refit=refit)
            losses.append(loss(grid, codes, (weights, damped)))
        assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses))
        assert losses[-1] < 0.995 * losses[0]
    codec_named(name).encode(grid.numpy(), codes.numpy())  # raises if a run is no vector, or a number left its range


@pytest.mark.parametrize("name", ["gguf:IQ3_XXS", "gguf:IQ2_S", "gguf:IQ1_S"])
def test_the_loss_of_feedback_is_the_sum_of_its_steps(name: str, problem: Problem) -> None:
    weights = problem[0]
    grid, codes, cholesky = solved(name, problem)
    upper = cholesky.rows(slice(0, 128))[:, :128].contiguous()
    scale = grid.per_group(len(weights))[0][:, cholesky.order // grid.group].contiguous()
    first, errors = solve_vectors.feedback_block(
        weights[:, cholesky.order[:128]].contiguous(), upper, scale[:, :128].contiguous(), grid
    )
    assert torch.equal(first, codes[:, cholesky.order[:128]])
    changed = grid.values(codes)[:, cholesky.order[:128]] - weights[:, cholesky.order[:128]]
    # With the later columns free, the loss of the first ones is that under the inverse of their part of H^-1.
    metric = torch.linalg.inv(upper.double().T @ upper.double())
    assert float(errors.double().square().sum()) == pytest.approx(
        float(((changed.double() @ metric) * changed).sum()), rel=1e-3
    )


def least(target: torch.Tensor, metric: torch.Tensor, name: str) -> torch.Tensor:
    """Returns the least loss of each target [n, 8] under a metric, of all vectors and signs, by trying all."""
    codec = codec_named(name)
    table = torch.from_numpy(codec.levels[codec.codebook.vectors]).double()
    if codec.codebook.width == 4:
        table = torch.cat([table.repeat_interleave(len(table), 0), table.repeat(len(table), 1)], 1)
    root, best = torch.linalg.cholesky(metric.double()), torch.full((len(target),), torch.inf, dtype=torch.float64)
    for signs in itertools.product((1.0, -1.0), repeat=EIGHT):
        if codec.codebook.even and signs.count(-1.0) % 2:
            continue
        best = best.minimum(torch.cdist(target.double() @ root, (table * torch.tensor(signs)) @ root).amin(1).square())
    return best


@pytest.mark.parametrize(("name", "most"), [("gguf:IQ2_XXS", 1.05), ("gguf:IQ2_S", 1.05)])
def test_few_searches_of_the_codebook_miss_the_best_vectors(name: str, most: float) -> None:
    """The whole codebook is searched under the metric for given signs; only signs descend."""
    draw = torch.Generator().manual_seed(2)
    codec, mixing = codec_named(name), torch.eye(EIGHT) + 0.2 * torch.randn(EIGHT, EIGHT, generator=draw)
    upper = torch.linalg.cholesky(mixing @ mixing.T).mT.contiguous()
    target = 3 * torch.randn(32, EIGHT, generator=draw)
    grid = TensorGrid(EIGHT, torch.from_numpy(codec.levels)[None], False, codebook=codec.codebook)
    _, errors = solve_vectors.feedback_block(target, upper, torch.ones(32, EIGHT), grid)
    metric = torch.linalg.inv(upper.double().T @ upper.double())
    best = least(target, metric, name)
    reached = errors.double().square().sum(1)
    assert bool((reached >= best * (1 - 1e-4)).all())
    assert float(reached.sum()) < most * float(best.sum())


def test_every_lifted_vector_is_searched() -> None:
    """Where no signs descend, the search that leaves out vectors by bounds finds what trying all finds."""
    draw = torch.Generator().manual_seed(3)
    codec, mixing = codec_named("gguf:IQ1_M"), torch.eye(EIGHT) + 0.2 * torch.randn(EIGHT, EIGHT, generator=draw)
    upper = torch.linalg.cholesky(mixing @ mixing.T).mT.contiguous()
    target = torch.randn(64, EIGHT, generator=draw)
    grid = TensorGrid(EIGHT, torch.from_numpy(codec.levels)[None], False, codebook=codec.codebook)
    _, errors = solve_vectors.feedback_block(target, upper, torch.ones(64, EIGHT), grid)
    inverse = torch.linalg.inv(upper.double())
    table = torch.from_numpy(
        codec.levels[np.concatenate([codec.codebook.vectors, codec.codebook.vectors + 1])]
    ).double()
    best = torch.cdist(target.double() @ inverse, table @ inverse).amin(1).square()
    torch.testing.assert_close(errors.double().square().sum(1), best, rtol=1e-4, atol=1e-6)


def test_columns_that_cannot_be_told_apart_are_searched_one_by_one() -> None:
    """A metric that is not positive definite has no factor; the loss must not rise nonetheless."""
    draw = torch.Generator().manual_seed(4)
    weights, hessian = torch.randn(4, 256, generator=draw), torch.ones(256, 256)
    codec = codec_named("gguf:IQ2_XS")
    grid = fit(codec, weights, hessian.diagonal())
    codes = grid.nearest(weights)
    assert loss(*solve.refine(weights, hessian, grid, codes, sweeps=1, refit=False), (weights, hessian)) <= loss(
        grid, codes, (weights, hessian)
    )


@every_type
def test_vectors_of_a_book_stand_by_their_first_halves(name: str) -> None:
    codec = codec_named(name)
    table, half = book(codec.codebook, codec.levels.tobytes()), codec.codebook.width // 2
    assert sorted(table.vectors.tolist()) == sorted(codec.codebook.vectors.tolist())
    heads, values = int(table.starts[0]), codec.levels[table.vectors] + table.shift
    runs = np.diff(table.starts.astype(int))
    np.testing.assert_array_equal(np.repeat(table.halves[:half, :heads].T, runs, axis=0), values[:, :half])
    np.testing.assert_array_equal(table.halves[:half, heads:].T, values[:, half:])
    assert not table.halves[half:].any()


def test_a_factor_in_another_order_is_computed_again(problem: Problem) -> None:
    weights, hessian = problem
    settings = Recipe("model", "gguf:IQ2_XS").solver_settings
    assert isinstance(settings, SolverSettings)
    scattered = factorize(hessian, settings.dampening, True)
    assert not scattered.keeps_together(8)
    assert factorize(hessian, None, True, unit=8).keeps_together(8)
    assert factorize(hessian, None, False).keeps_together(32)
    alone = solve_linear("x.weight", weights, hessian, "gguf:IQ2_XS", settings)
    shared = solve_linear("x.weight", weights, hessian, "gguf:IQ2_XS", settings, cholesky=scattered)
    np.testing.assert_array_equal(values_of(alone), values_of(shared))


def test_columns_stay_together_where_all_types_need_it() -> None:
    assert unit_of(["gguf:IQ2_XS", "gguf:IQ3_S"]) == 8
    assert unit_of(["gguf:IQ2_XS", "gguf:IQ1_S"]) == 32
    assert unit_of(["gguf:IQ2_XS", "gguf:Q4_K"]) == 1
    assert unit_of(["gguf:F16"]) == 1
    assert unit_of([]) == 1


def test_a_solved_file_is_read_by_llamacpp_as_solved(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    """Solved in four types, tuned, written, decoded by llama.cpp, and verified."""
    types = ["*.k_proj.weight=IQ2_XS", "*.up_proj.weight=IQ2_S", "*.down_proj.weight=IQ1_M"]
    recipe = Recipe(
        str(tiny_model), "iq3_xxs", calibration=str(text), samples=2, sequence_length=32, tune=2, types=types
    )
    quantize(recipe, tmp_path / "out", device="cpu")
    artifact = Artifact(tmp_path / "out")
    used = {artifact.read(name).codec_name for name in artifact.manifest() if "proj" in name}
    assert used == {f"gguf:{name}" for name in ("IQ3_XXS", "IQ2_XS", "IQ2_S", "IQ1_M")}
    gguf.write(artifact, tmp_path / "model.gguf")
    llamacpp_quantizer.quantize(tmp_path / "model.gguf", tmp_path / "decoded.gguf", "F32", requantize=True)
    decoded = GGUFModel(tmp_path / "decoded.gguf")
    for name in artifact.manifest():
        np.testing.assert_array_equal(values_of(artifact.read(name)).numpy(), np.asarray(decoded.read(name)))
    result = verify(tmp_path / "model.gguf", str(tiny_model), text=str(text), windows=1, max_perplexity_ratio=None)
    assert result.failed == []
