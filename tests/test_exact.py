"""The exact solver, which solves each row in the order of Optimal Brain Quantization."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lqexport.converters.plan import PlannedTensor
from lqexport.errors import UserError
from lqexport.formats.registry import codec_named
from lqexport.grids.fit import fit, minmax
from lqexport.grids.grid import TensorGrid
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.solver.cholesky import factorize
from lqexport.solver.feedback import damped
from lqexport.solver.linear import solve_linear
from lqexport.solver.solve_exact import check_exact, in_own_order

Matrix = NDArray[np.float64]


@pytest.fixture(scope="module")
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [6, 48], and the Hessian of correlated inputs that differ in size; one column is always zero."""
    draw = torch.Generator().manual_seed(2)
    weights = torch.randn(6, 48, generator=draw)
    mixing = torch.randn(48, 48, generator=draw) / 6 + torch.eye(48)
    inputs = torch.randn(200, 48, generator=draw) @ mixing * torch.rand(48, generator=draw)
    inputs[:, 7] = 0
    return weights, inputs.T @ inputs / 200


def row_codes(weights: Matrix, hessian: Matrix, table: Matrix) -> list[int]:
    """Returns the codes of one row by the definition: every step inverts the Hessian of the columns that are left."""
    weights, left, codes = weights.copy(), list(range(len(weights))), [0] * len(weights)
    below, above = (table[1] - table[0]) / 2, (table[-1] - table[-2]) / 2
    while left:
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        now = weights[left]
        nearest = np.abs(now[:, None] - table).argmin(1)
        error = now - table[nearest]
        off_grid = (now < table[0] - below) | (now > table[-1] + above)
        costs = np.where(off_grid, -(error**2), error**2 / np.diag(inverse))
        place = int(costs.argmin())
        codes[left[place]] = int(nearest[place])
        weights[left] -= error[place] / inverse[place, place] * inverse[place]
        del left[place]
    return codes


def loss(grid: TensorGrid, codes: torch.Tensor, weights: torch.Tensor, hessian: torch.Tensor) -> float:
    difference = (grid.values(codes) - weights).double()
    return float(((difference @ hessian.double()) * difference).sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("stretch", [1.0, 0.5])
def test_rows_are_solved_by_the_definition(
    bits: int, stretch: float, problem: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Covers tables so narrow that many weights are off the grid from the start."""
    weights, hessian = problem
    grid = fit(codec_named(f"native:table-{bits}"), weights, hessian.diagonal())
    grid = TensorGrid(48, grid.levels * stretch, False)
    codes = in_own_order(weights, grid, factorize(hessian, 0.05, True))
    moments = damped(hessian.double(), 0.05).numpy()
    expected = [
        row_codes(row, moments, table)
        for row, table in zip(weights.double().numpy(), grid.levels.double().numpy(), strict=True)
    ]
    assert codes.tolist() == expected


def test_the_given_order_and_the_number_of_threads_change_nothing(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    from lqexport.kernels.exact import solve_rows

    weights, hessian = problem
    grid = minmax(codec_named("native:table-3"), weights)
    codes = [in_own_order(weights, grid, factorize(hessian, 0.05, act_order)) for act_order in (True, False)]
    assert torch.equal(*codes)
    inverse = torch.linalg.inv(damped(hessian.double(), 0.05)).float().numpy()
    many = np.zeros(weights.shape, np.uint8)
    solve_rows(weights.numpy().copy(), inverse, grid.levels.numpy(), many, 4)
    np.testing.assert_array_equal(many, codes[0].numpy())


def test_error_is_spread(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    weights, hessian = problem
    grid = fit(codec_named("native:table-3"), weights, hessian.diagonal())
    codes = in_own_order(weights, grid, factorize(hessian, 0.05, True))
    assert loss(grid, codes, weights, hessian) < 0.8 * loss(grid, grid.nearest(weights), weights, hessian)


def test_nearly_singular_moments(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    """With fewer tokens than columns and almost no dampening, float32 cannot hold the inverse."""
    weights, draw = problem[0], torch.Generator().manual_seed(5)
    inputs = torch.randn(20, 48, generator=draw)
    hessian = inputs.T @ inputs / 20
    grid = fit(codec_named("native:table-3"), weights, hessian.diagonal())
    codes = in_own_order(weights, grid, factorize(hessian, 1e-6, True))
    assert loss(grid, codes, weights, hessian) < 0.5 * loss(grid, grid.nearest(weights), weights, hessian)


def test_the_solver_is_taken_and_descent_follows(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    weights, hessian = problem

    def recorded(**options: object) -> float:
        recipe = Recipe("source", "native:table-2", **options)  # type: ignore[arg-type]
        return float(solve_linear("x", weights, hessian, "native:table-2", recipe.solver_settings).facts["loss"])

    blocked, alone = recorded(descent=0), recorded(solver="exact", descent=0)
    assert alone != blocked
    assert recorded(solver="exact") < alone


def test_a_model_is_quantized(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    options = {"calibration": str(text), "samples": 2, "sequence_length": 64, "moments": "plain", "tune": 0}
    report = quantize(Recipe(str(tiny_model), "native:table-2", solver="exact", **options), tmp_path / "out")  # type: ignore[arg-type]
    assert report["run"]["recipe"]["solver"] == "exact"
    assert all(entry["loss"] > 0 for entry in report["tensors"] if entry["codec"] == "native:table-2")


@pytest.mark.parametrize("target", ["gguf:Q4_K", "native:affine-4-g64"])
def test_formats_without_a_table_are_refused(target: str, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs a table per row, and model\.layers\.0"):
        quantize(Recipe(str(tiny_model), target, solver="exact"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_takes_too_long_is_refused() -> None:
    small = PlannedTensor("small", (384, 1536), "native:table-4", True)
    check_exact([small] * 100)
    large = PlannedTensor("large", (28672, 8192), "native:table-4", True)
    with pytest.raises(UserError, match=r"would take about \d+ hours on \d+ threads"):
        check_exact([large] * 100)


def test_rounding_has_no_solver() -> None:
    with pytest.raises(UserError, match="rtn solves nothing"):
        Recipe("source", "native:table-4", method="rtn", solver="exact")
