"""Solving inside EXL2's grid: values are the file's, no step raises the loss, and torch equals the kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from lqexport.formats.registry import codec_named
from lqexport.grids import fit_sections as fitting
from lqexport.grids.fit_sections import fit_sections, minmax_sections
from lqexport.grids.sections import TensorSections
from lqexport.pipeline import measured_losses
from lqexport.pipeline.exl2_mixes import mix_losses
from lqexport.recipe import Recipe
from lqexport.solver import feedback, solve_cpu, solve_sections, solve_torch
from lqexport.solver.cholesky import factorize
from lqexport.solver.linear import solve_linear

NAMES = ["exl2:2g32x8", "exl2:4g128x2", "exl2:8g32x1+5g64x1+4g32x1+3g96x1+2g32x1"]
every_name = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def problem(make_problem: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    return make_problem()


def solved(name: str, weights: torch.Tensor, hessian: torch.Tensor) -> tuple[TensorSections, torch.Tensor]:
    cholesky = factorize(hessian.double(), 0.01, True)
    grid = fit_sections(codec_named(name), weights, hessian.diagonal(), cholesky.order)
    return grid, feedback.feedback(weights, grid, cholesky)


def loss(grid: TensorSections, codes: torch.Tensor, weights: torch.Tensor, hessian: torch.Tensor) -> float:
    return feedback.layer_loss((grid.values(codes) - weights).double(), hessian.double())


@every_name
@pytest.mark.parametrize("size", [1.0, 1e-3, 30.0])
def test_tensor_grid_is_the_formats_grid(name: str, size: float, problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Covers weights so small that maximum / 256 is a subnormal float16."""
    weights, hessian = problem[0] * size, problem[1]
    grid, codes = solved(name, weights, hessian)
    stored = grid.numpy()
    np.testing.assert_array_equal(grid.values(codes).numpy(), stored.values(codes.numpy()))
    decoded = codec_named(name).decode(codec_named(name).encode(stored, codes.numpy()), 256)
    np.testing.assert_array_equal(decoded.view(np.uint32), stored.values(codes.numpy()).view(np.uint32))


@every_name
def test_columns_are_stored_by_falling_activation(name: str, problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    weights, hessian = problem
    tensor = solve_linear("x", weights, hessian, name, Recipe("x", "exl2", bits=3).solver_settings)
    order = np.argsort(tensor.planes["q_invperm"])
    assert np.all(np.diff(hessian.diagonal().numpy()[order]) <= 0)


@every_name
def test_fit_is_no_worse_than_the_range(name: str, problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    weights, hessian = problem
    weight, order = hessian.diagonal(), hessian.diagonal().argsort(descending=True)

    def error(grid: TensorSections) -> float:
        return float(((grid.values(grid.nearest(weights)) - weights).square() * weight).sum())

    fitted = fit_sections(codec_named(name), weights, weight, order)
    assert error(fitted) < 0.99 * error(minmax_sections(codec_named(name), weights, order))


def test_fit_finds_the_best_scale_codes(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Compares the fit with all scale codes of each row, under the chosen maxima.

    The search itself leaves out codes that are hardly ever the best.
    """
    weights, hessian = problem
    grid = fit_sections(codec_named("exl2:3g32x8"), weights, hessian.diagonal(), torch.arange(256))
    scale = grid.sections[0]
    errors = []
    for subs in (scale.subs, *(torch.full_like(scale.subs, code) for code in range(16))):
        spread = fitting.squared_scale(scale.maxima, subs).repeat_interleave(32, 1)
        level = (weights / torch.where(spread == 0, torch.inf, spread)).round().clamp(-4, 3)
        off = (weights - spread * level).square() * hessian.diagonal()
        errors.append(off.unflatten(1, (-1, 32)).sum(2))
    least = torch.stack(errors[1:]).amin(0)
    assert bool((errors[0] >= least * (1 - 1e-4)).all())
    assert float(errors[0].sum()) < 1.001 * float(least.sum())


def test_torch_fit_equals_the_kernel(
    problem: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, hessian = problem
    arguments = codec_named(NAMES[2]), weights, hessian.diagonal(), hessian.diagonal().argsort(descending=True)
    by_kernel = fit_sections(*arguments)
    monkeypatch.setattr(fitting, "_best_subs_cpu", fitting._best_subs)
    for kernel_section, torch_section in zip(by_kernel.sections, fit_sections(*arguments).sections, strict=True):
        torch.testing.assert_close(kernel_section.maxima, torch_section.maxima)
        assert (kernel_section.subs != torch_section.subs).float().mean() < 0.05  # codes of nearly equal error


@every_name
def test_feedback_lowers_the_loss_of_rounding(name: str, problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    weights, hessian = problem
    grid, codes = solved(name, weights, hessian)
    assert loss(grid, codes, weights, hessian) < 0.9 * loss(grid, grid.nearest(weights), weights, hessian)


@every_name
def test_refinement_never_raises_the_loss(name: str, problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    weights, hessian = problem
    damped = feedback.damped(hessian, 0.01)
    grid, codes = solved(name, weights, hessian)
    started = grid
    losses = [loss(grid, codes, weights, damped)]
    for _ in range(3):
        grid, codes = solve_sections.refine_sections(weights, damped, grid, codes, sweeps=1)
        losses.append(loss(grid, codes, weights, damped))
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.998 * losses[0]
    moved = [
        not torch.equal(getattr(old, field), getattr(new, field))
        for old, new in zip(started.sections, grid.sections, strict=True)
        for field in ("maxima", "subs")
    ]
    assert all(moved) or name != NAMES[0]  # at more bits a step of a scale code is too coarse to help
    codec_named(name).encode(grid.numpy(), codes.numpy())  # raises if a stored number left its range


@every_name
def test_torch_path_equals_the_kernels(
    name: str, problem: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, hessian = problem
    results = []
    for backend in (solve_cpu, solve_torch):
        for module in (feedback, solve_sections):
            monkeypatch.setattr(module, "backend", lambda *_, chosen=backend: chosen)
        grid, codes = solved(name, weights, hessian)
        results.append(
            (codes, *solve_sections.refine_sections(weights, feedback.damped(hessian, 0.01), grid, codes, sweeps=1))
        )
    (first, grid, codes), (other_first, other_grid, other_codes) = results
    assert (first != other_first).float().mean() < 2e-3  # a tie or a last bit may go the other way, then spread
    assert loss(grid, codes, weights, hessian) == pytest.approx(
        loss(other_grid, other_codes, weights, hessian), rel=2e-3
    )


@pytest.mark.parametrize("method", ["rtn", "gptq", "lean"])
def test_every_method_solves_into_exl2(method: str, problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    weights, hessian = problem
    recipe = Recipe("x", "exl2", method=method, bits=4)
    tensor = solve_linear("x", weights, None if method == "rtn" else hessian, "exl2:4g32x8", recipe.solver_settings)
    assert tensor.facts["weight_error"] < 0.03


def test_inputs_and_weights_of_zero_survive() -> None:
    for name in NAMES:
        tensor = solve_linear(
            "x", torch.zeros(32, 256), torch.zeros(256, 256), name, Recipe("x", "exl2", bits=3).solver_settings
        )
        assert not codec_named(name).decode(tensor.planes, 256).any()


def test_weights_at_the_end_of_float16_stay_finite() -> None:
    weights = torch.full((32, 256), 32752.0)
    weights[:, ::2] = -65504
    for name in NAMES:
        tensor = solve_linear(
            "x", weights, torch.eye(256), name, Recipe("x", "exl2", bits=3, descent=1).solver_settings
        )
        values = codec_named(name).decode(tensor.planes, 256)
        assert np.isfinite(values).all()
        assert values[0, 0] < -60000


@pytest.mark.parametrize("name", [NAMES[2], "gptq:4-g64-act"])
def test_second_moments_that_cannot_be_factorized_do_not_end_a_run(name: str) -> None:
    """The Hessian of one token in float32: dampening rises until the factorization succeeds, and is recorded."""
    token = torch.randn(256, generator=torch.Generator().manual_seed(1)) * 1e4
    weights = torch.randn(32, 256, generator=torch.Generator().manual_seed(2))
    hessian = torch.outer(token, token) - 1e3 * torch.eye(256)  # not positive definite
    tensor = solve_linear("x", weights, hessian, name, Recipe("x", "native:table-4", dampening=0).solver_settings)
    assert tensor.facts["dampening"] > 0
    assert np.isfinite(codec_named(name).decode(tensor.planes, 256)).all()


def test_mixes_cost_less_the_more_bytes_they_take(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    weights, hessian = problem
    recipe = Recipe("x", "exl2", bits=3, moments="normalized", descent=0)
    tried = measured_losses.options(
        mix_losses(weights, hessian, recipe.solver_settings, guided=recipe.moments == "guided"), tuple(weights.shape)
    )
    options = {option.name: option for option in tried}
    assert {"exl2:2g32x8", "exl2:8g32x8"} < options.keys()
    assert all(sum(run.columns for run in codec_named(name).runs) == 256 for name in options)
    pure = [options[f"exl2:{bits}g32x8"] for bits in (2, 3, 4, 5, 6, 8)]
    assert all(wider.loss < narrower.loss / 2 for narrower, wider in itertools.pairwise(pure))
    # All 64 rows are measured here, so the predicted loss is that of solving.
    solved = solve_linear("x", weights, hessian, "exl2:3g32x8", recipe.solver_settings)
    assert solved.facts["relative_error"] == pytest.approx(options["exl2:3g32x8"].loss, rel=1e-3)
    # The activations differ widely in size, so mixes beat the pure width of the same size.
    best = min(option.loss for option in options.values() if option.nbytes <= options["exl2:3g32x8"].nbytes)
    assert best < 0.8 * options["exl2:3g32x8"].loss
