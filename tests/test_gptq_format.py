"""GPTQ's layout: the laws of its codecs, a slow reference decoder, refused inputs, and solving in its grid."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lqexport.formats.codec import Grid, Planes, Rounding, Scales, Sections
from lqexport.formats.gptq import GPTQ, LEVELS, Gptq
from lqexport.formats.registry import codec_named
from lqexport.grids.fit_sections import fit_sections, minmax_sections
from lqexport.grids.sections import TensorSections, ZeroSection
from lqexport.recipe import Recipe
from lqexport.solver import feedback, solve_sections
from lqexport.solver.cholesky import factorize
from lqexport.solver.linear import solve_linear

pytestmark = pytest.mark.filterwarnings("error")
every_codec = pytest.mark.parametrize("name", GPTQ)
seeds = st.integers(0, 2**32 - 1)
examples = settings(max_examples=10, deadline=None, derandomize=True)
SOLVED = ["gptq:4-g32", "gptq:4-g64-sym", "gptq:4-g64-act", "gptq:4-row"]
every_solved = pytest.mark.parametrize("name", SOLVED)


def random_case(name: str, seed: int, blocks: int = 2) -> tuple[Gptq, Sections, np.ndarray]:
    """Returns a codec, a random grid of it and codes [32 or 64, columns of `blocks` blocks].

    Scales have any size and sign that the codec holds.
    """
    rng, codec = np.random.default_rng(seed), GPTQ[name]
    rows, columns = 32 * int(rng.integers(1, 3)), codec.block * blocks
    groups = codec.scale.groups(columns)
    supers = (rng.normal(0, 1, (rows, groups)) * 10.0 ** rng.integers(-7, 3)).astype(np.float16)
    supers[rng.random(supers.shape) < 0.1] = rng.choice(np.array([0, 2.0**-24, 4094, -4094], np.float16))
    zeros = rng.integers(codec.zero.low, codec.zero.high, (rows, groups), dtype=np.int16, endpoint=True)
    grid = Grid(columns, LEVELS, Scales(codec.scale, supers, np.ones_like(zeros)), Scales(codec.zero, supers, zeros),
                rounding=Rounding.HALF)  # fmt: skip
    order = rng.permutation(columns) if codec.reorders else np.arange(columns)
    return codec, Sections(order, (grid,)), rng.integers(0, 16, (rows, columns), dtype=np.uint8)


@every_codec
@examples
@given(seed=seeds, blocks=st.integers(1, 3))
def test_decoding_what_was_encoded_gives_the_grids_values_bitwise(name: str, seed: int, blocks: int) -> None:
    codec, grid, codes = random_case(name, seed, blocks)
    planes = codec.encode(grid, codes)
    assert codec.decode(planes, codes.shape[1]).tobytes() == grid.values(codes).tobytes()
    unpacked, unpacked_codes = codec.unpack(planes, codes.shape[1])
    again = codec.encode(unpacked, unpacked_codes)
    assert np.array_equal(unpacked_codes, codes)
    assert all(np.array_equal(again[plane], planes[plane]) for plane in planes)


def by_description(planes: Planes, row: int, column: int) -> np.float16:
    """Decodes one weight by the format's description. NumPy's float16 rounds the product."""
    group = planes["g_idx"][column]
    code = int(planes["qweight"][column // 8, row]) >> (4 * (column % 8)) & 15
    zero = (int(planes["qzeros"][group, row // 8]) >> (4 * (row % 8)) & 15) + 1
    return planes["scales"][group, row] * np.float16(code - zero)


@every_codec
def test_values_are_those_of_the_description(name: str) -> None:
    codec, grid, codes = random_case(name, 5)
    planes = codec.encode(grid, codes)
    rng, values = np.random.default_rng(1), grid.values(codes)
    for row, column in zip(rng.integers(0, len(codes), 200), rng.integers(0, codes.shape[1], 200), strict=True):
        assert np.float32(by_description(planes, row, column)) == values[row, column]


def test_names_are_the_registrys() -> None:
    assert all(codec_named(name).name == name for name in GPTQ)
    assert len(GPTQ) == 14
    with pytest.raises(ValueError, match="Unknown format"):
        codec_named("gptq:3-g128")


def test_grids_that_the_layout_cannot_hold_are_refused() -> None:
    codec, grid, codes = random_case("gptq:4-g32", 3)
    run = grid.grids[0]
    scale, offset = run.scale, run.offset
    assert isinstance(scale, Scales)
    assert isinstance(offset, Scales)
    huge = np.full_like(scale.supers, 5000)
    wrong = {
        "zero points .* 1..15": replace(run, offset=replace(offset, subs=np.zeros_like(offset.subs))),
        "must lie in": replace(run, offset=replace(offset, subs=np.full_like(offset.subs, 16))),
        "very same scales": replace(run, offset=replace(offset, supers=offset.supers + np.float16(1))),
        "too large": replace(run, scale=replace(scale, supers=huge), offset=replace(offset, supers=huge)),
        "other scales": replace(run, rounding=Rounding.NONE),
        "other scales or levels": replace(run, levels=LEVELS + 1),
        "one per row": replace(run, scale=replace(scale, supers=scale.supers[:1])),
    }
    for message, wrong_run in wrong.items():
        with pytest.raises(ValueError, match=message):
            codec.encode(replace(grid, grids=(wrong_run,)), codes)
    with pytest.raises(ValueError, match="too large for 4 bits"):
        codec.encode(grid, codes + 16)
    with pytest.raises(ValueError, match="one grid"):
        codec.encode(replace(grid, grids=(run, run)), codes)
    with pytest.raises(ValueError, match="consecutive"):
        codec.encode(replace(grid, order=grid.order[::-1].copy()), codes)
    with pytest.raises(ValueError, match="multiple of 32 rows"):
        codec.layout(48, 64)
    with pytest.raises(ValueError, match="128 columns"):
        GPTQ["gptq:4-g128"].layout(64, 192)


def test_planes_that_readers_decode_otherwise_are_refused() -> None:
    codec, grid, codes = random_case("gptq:4-g32-sym-act", 8)
    planes, columns = codec.encode(grid, codes), codes.shape[1]
    wrong = {
        "each group 32 columns": {"g_idx": np.zeros(columns, np.int32)},
        "must lie in 8..8": {"qzeros": planes["qzeros"] ^ 1},
        "not a number": {"scales": np.full_like(planes["scales"], np.nan)},
        "must be int32": {"qweight": planes["qweight"][1:]},
    }
    for message, wrong_planes in wrong.items():
        with pytest.raises(ValueError, match=message):
            codec.decode(planes | wrong_planes, columns)
    with pytest.raises(ValueError, match="one after the other"):
        GPTQ["gptq:4-g32-sym"].decode(planes | {"g_idx": np.arange(columns, dtype=np.int32)[::-1] // 32}, columns)


# Solving.


@pytest.fixture(scope="module")
def problem(make_problem: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    return make_problem(far_out=True)


def solved(name: str, weights: torch.Tensor, hessian: torch.Tensor) -> tuple[TensorSections, torch.Tensor]:
    """Returns the fitted grid and the codes of error feedback."""
    cholesky = factorize(hessian.double(), 0.01, True)
    order = cholesky.order if GPTQ[name].reorders else torch.arange(256)
    grid = fit_sections(GPTQ[name], weights, hessian.diagonal(), order)
    return grid, feedback.feedback(weights, grid, cholesky)


def loss(grid: TensorSections, codes: torch.Tensor, weights: torch.Tensor, hessian: torch.Tensor) -> float:
    return feedback.layer_loss((grid.values(codes) - weights).double(), hessian.double())


@every_codec
def test_tensor_grid_is_the_formats_grid(name: str, problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    weights, hessian = problem
    grid, codes = solved(name, weights, hessian)
    stored = grid.numpy()
    np.testing.assert_array_equal(grid.values(codes).numpy(), stored.values(codes.numpy()))
    decoded = GPTQ[name].decode(GPTQ[name].encode(stored, codes.numpy()), 256)
    np.testing.assert_array_equal(decoded.view(np.uint32), stored.values(codes.numpy()).view(np.uint32))


def rounding_error(grid: TensorSections, weights: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Returns the weighted squared error of each row, rounded to nearest."""
    return ((grid.values(grid.nearest(weights)) - weights).square() * importance).sum(1)


@every_codec
def test_fit_is_better_than_the_range(name: str, problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    weights, hessian = problem
    importance, order = hessian.diagonal(), torch.arange(256)
    fitted = rounding_error(fit_sections(GPTQ[name], weights, importance, order), weights, importance)
    spanned = rounding_error(minmax_sections(GPTQ[name], weights, order), weights, importance)
    assert fitted.sum() < 0.7 * spanned.sum()


def test_fit_finds_about_the_best_zero_points(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Compares the fit with all fifteen zero points of every group, each with the best of 200 scales."""
    weights, hessian = problem[0][:16], problem[1]
    importance = hessian.diagonal()
    fitted = rounding_error(
        fit_sections(GPTQ["gptq:4-g64"], weights, importance, torch.arange(256)), weights, importance
    )
    groups, weight = weights.unflatten(1, (-1, 64)), importance.unflatten(0, (-1, 64))
    span = (groups.amax(2).clamp_min(0) - groups.amin(2).clamp_max(0)).clamp_min(1e-9)
    least = torch.full(span.shape, torch.inf)
    for zero, share in itertools.product(range(1, 16), torch.linspace(0.2, 2, 200)):
        scale = (share * span / 15)[..., None]
        level = (groups / scale).round().clamp(-zero, 15 - zero)
        least = least.minimum((weight * (scale * level - groups).square()).sum(2))
    assert fitted.sum() < 1.05 * least.sum()


@every_solved
def test_feedback_and_refinement_lower_the_loss(name: str, problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    weights, hessian = problem
    damped = feedback.damped(hessian, 0.01)
    grid, codes = solved(name, weights, hessian)
    assert loss(grid, codes, weights, hessian) < 0.9 * loss(grid, grid.nearest(weights), weights, hessian)
    fitted, losses = grid.sections[0], [loss(grid, codes, weights, damped)]
    for _ in range(3):
        grid, codes = solve_sections.refine_sections(weights, damped, grid, codes, sweeps=1)
        losses.append(loss(grid, codes, weights, damped))
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.98 * losses[0]
    section = grid.sections[0]
    assert isinstance(section, ZeroSection)
    assert isinstance(fitted, ZeroSection)
    assert not torch.equal(section.scales, fitted.scales)
    GPTQ[name].encode(grid.numpy(), codes.numpy())  # raises if a stored number left its range


@pytest.mark.parametrize("method", ["rtn", "gptq", "lean"])
@every_solved
def test_every_method_solves_into_the_layout(
    name: str, method: str, problem: tuple[torch.Tensor, torch.Tensor]
) -> None:
    weights, hessian = problem
    tensor = solve_linear(
        "x", weights, None if method == "rtn" else hessian, name, Recipe("x", name, method=method).solver_settings
    )
    assert tensor.facts["weight_error"] < 0.08
    codec_named(name).decode(tensor.planes, 256)


def test_groups_in_act_order_are_of_like_activations(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    weights, hessian = problem
    tensor = solve_linear("x", weights, hessian, "gptq:4-g32-act", Recipe("x", "gptq:4-g32-act").solver_settings)
    energies = [hessian.diagonal().numpy()[tensor.planes["g_idx"] == group] for group in range(8)]
    assert all(after.max() <= before.min() for before, after in itertools.pairwise(energies))


def test_inputs_and_weights_of_zero_survive() -> None:
    for name in GPTQ:
        tensor = solve_linear("x", torch.zeros(32, 128), torch.zeros(128, 128), name, Recipe("x", name).solver_settings)
        assert not codec_named(name).decode(tensor.planes, 128).any()


def test_the_largest_weights_of_all_layouts_stay_finite() -> None:
    weights = torch.full((32, 128), 28658.0)
    weights[:, ::2] = -32752
    for name in GPTQ:
        tensor = solve_linear("x", weights, torch.eye(128), name, Recipe("x", name, descent=1).solver_settings)
        values = codec_named(name).decode(tensor.planes, 128)
        assert np.isfinite(values).all()
        assert values[0, 0] < -25000
