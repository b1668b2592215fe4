"""The solver: properties that hold for every grid, and the CPU kernels compared with the torch path."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType

import libgguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from lqexport.calibration.moments import SecondMoments
from lqexport.errors import UserError
from lqexport.formats.registry import codec_named, names
from lqexport.grids import fit as fitting
from lqexport.grids.fit import fit, minmax, store
from lqexport.grids.grid import Numbers, TensorGrid
from lqexport.solver import feedback as solve
from lqexport.solver import solve_cpu, solve_torch
from lqexport.solver.cholesky import SHARE_OF_MEDIAN, factorize
from lqexport.solver.importance import importance
from lqexport.solver.solve_cpu import stored

GRIDS = [name for name in names() if hasattr(codec_named(name), "levels") and name not in names("mlx")]
FEW = [
    "gguf:Q2_K",
    "gguf:Q3_K",
    "gguf:Q4_K",
    "gguf:Q4_0",
    "gguf:Q4_1",
    "gguf:IQ4_XS",
    "gguf:MXFP4",
    "gguf:NVFP4",
    "gguf:TQ1_0",
    "gguf:Q1_0",
    "native:table-3",
    "native:affine-3-g64",
    "native:mxint-3-g32",
]


@pytest.fixture(scope="module")
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [24, 512], and the Hessian of correlated inputs that differ widely in size; one column is always zero."""
    draw = torch.Generator().manual_seed(1)
    weights = torch.randn(24, 512, generator=draw) * torch.rand(24, 1, generator=draw)
    mixing = torch.randn(512, 512, generator=draw) / 16 + torch.eye(512)
    inputs = torch.randn(2048, 512, generator=draw) @ mixing * torch.rand(512, generator=draw).pow(2)
    inputs[:, 100] = 0
    moments = SecondMoments(512, "plain", torch.device("cpu"))
    moments.add(inputs)
    return weights, moments.hessian()


def solved(name: str, weights: torch.Tensor, hessian: torch.Tensor) -> tuple[TensorGrid, torch.Tensor]:
    grid = fit(codec_named(name), weights, hessian.diagonal())
    return grid, solve.feedback(weights, grid, factorize(hessian.double(), 0.01, True))


def loss(grid: TensorGrid, codes: torch.Tensor, weights: torch.Tensor, hessian: torch.Tensor) -> float:
    return solve.layer_loss((grid.values(codes) - weights).double(), hessian.double())


@pytest.mark.parametrize("name", GRIDS)
def test_tensor_grid_is_the_formats_grid(name: str, problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    weights, _ = problem
    grid = fit(codec_named(name), weights, torch.ones(512))
    codes = grid.nearest(weights)
    stored = grid.numpy()
    np.testing.assert_array_equal(grid.values(codes).numpy(), stored.values(codes.numpy()))
    decoded = codec_named(name).decode(codec_named(name).encode(stored, codes.numpy()), 512)
    np.testing.assert_array_equal(decoded.view(np.uint32), stored.values(codes.numpy()).view(np.uint32))


@pytest.mark.parametrize("name", GRIDS)
def test_fit_is_no_worse_than_the_range(name: str, problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    weights, hessian = problem
    weight = hessian.diagonal()

    def error(grid: TensorGrid) -> float:
        return float(((grid.values(grid.nearest(weights)) - weights).square() * weight).sum())

    assert error(fit(codec_named(name), weights, weight)) <= error(minmax(codec_named(name), weights)) * (1 + 1e-5)


@pytest.mark.parametrize("name", FEW)
def test_feedback_lowers_the_loss_of_rounding(name: str, problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    weights, hessian = problem
    grid, codes = solved(name, weights, hessian)
    assert loss(grid, codes, weights, hessian) < 0.9 * loss(grid, grid.nearest(weights), weights, hessian)


def test_feedback_loss_is_the_sum_of_the_steps(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The sum of ((w_i - q_i) / U_ii)^2 over the steps equals d (H + dampening) d^T: GPTQ rests on this identity."""
    weights, hessian = problem
    cholesky = factorize(hessian.double(), 0.01, False)
    grid = fit(codec_named("gguf:Q4_0"), weights, hessian.diagonal())
    scale, offset = (part.repeat_interleave(32, 1) for part in grid.per_group(len(weights)))
    upper = cholesky.rows(slice(0, len(cholesky.order)))
    codes, errors = solve_cpu.feedback_block(weights.clone(), upper, scale, offset, grid.levels, grid.uniform, False)
    damped = solve.damped(hessian.double(), 0.01)
    difference = (grid.values(codes) - weights).double()
    assert float(errors.double().square().sum()) == pytest.approx(solve.layer_loss(difference, damped), rel=1e-3)


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("name", FEW)
def test_refinement_never_raises_the_loss(name: str, refit: bool, problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    weights, hessian = problem
    damped = solve.damped(hessian, 0.01)
    grid, codes = solved(name, weights, hessian)
    losses = [loss(grid, codes, weights, damped)]
    for _ in range(3):
        grid, codes = solve.refine(weights, damped, grid, codes, sweeps=1, refit=refit)
        losses.append(loss(grid, codes, weights, damped))
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.995 * losses[0]
    codec_named(name).encode(grid.numpy(), codes.numpy())  # raises if a stored number left its range


@pytest.mark.parametrize("name", FEW)
def test_torch_path_equals_the_kernels(
    name: str, problem: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, hessian = problem
    results = []
    for backend in (solve_cpu, solve_torch):
        monkeypatch.setattr(solve, "backend", lambda *_, chosen=backend: chosen)
        grid, codes = solved(name, weights, hessian)
        refined = solve.refine(weights, solve.damped(hessian, 0.01), grid, codes, sweeps=1, refit=True)
        results.append((codes, *refined))
    (first, grid, codes), (other_first, other_grid, other_codes) = results
    assert (first != other_first).float().mean() < 2e-3  # a tie or a last bit may go the other way, then spread
    assert loss(grid, codes, weights, hessian) == pytest.approx(
        loss(other_grid, other_codes, weights, hessian), rel=2e-3
    )


@pytest.mark.parametrize("name", ["gguf:Q2_K", "gguf:Q3_K", "gguf:Q4_1", "gguf:IQ4_NL", "native:affine-4-row"])
def test_rounds_keep_values_and_gradient_up_to_date(name: str, problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Moves along a few directions per group change values and gradient as moving each value would."""
    weights, hessian = problem
    grid, codes = solved(name, weights, hessian)
    values, before = grid.values(codes), codes.clone()
    gradient = (values - weights) @ hessian
    moved = values.clone()
    solve_cpu.refine_block(moved, gradient, hessian, codes, grid, slice(0, weights.shape[1]), True, 3)
    assert not torch.equal(codes, before)
    torch.testing.assert_close(moved, grid.values(codes), rtol=1e-5, atol=1e-6)
    expected = (moved - weights) @ hessian
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_blocks_stored_numbers_are_contiguous_and_come_back() -> None:
    """A loop would be compiled again for arrays in another layout, which takes half a minute."""
    form = codec_named("gguf:Q2_K").scale
    numbers = Numbers(form, torch.zeros(3, 2), torch.zeros(3, 32, dtype=torch.int16))
    for block in (slice(0, 256), slice(256, 512), slice(0, 512)):
        with stored(numbers, form.group, block) as held:
            for array in (held.supers, held.subs):
                assert array.flags.c_contiguous
                array += 1
    assert numbers.supers.tolist() == [[2] * 2] * 3
    assert numbers.subs.tolist() == [[2] * 32] * 3


@pytest.mark.parametrize("name", ["gguf:Q2_K", "gguf:Q3_K", "gguf:Q4_1", "gguf:IQ4_NL", "native:affine-3-g64"])
def test_torch_fit_equals_the_kernel(name: str, problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    weights, hessian = problem
    chosen = codec_named(name)
    levels, uniform = fitting.shared_levels(chosen, weights.device)
    importances = fitting.normalized(hessian.diagonal().unflatten(0, (-1, chosen.scale.group)))
    ours = fitting._fit_cpu(weights, importances, levels, uniform, chosen.offset)
    groups = weights.unflatten(1, (-1, chosen.scale.group))
    theirs = fitting._fit_groups(groups, importances, levels, uniform, chosen.offset)

    def error(scale: torch.Tensor, shift: torch.Tensor) -> float:
        level = fitting._chosen(groups, scale, shift, levels, uniform)
        return float((importances * (groups - scale[..., None] * level - shift[..., None]).square()).sum())

    assert error(*ours) == pytest.approx(error(*theirs), rel=1e-3)


@pytest.mark.parametrize("name", ["TQ2_0", "Q1_0", "NVFP4"])
def test_grids_of_few_levels_and_of_small_floats_fit_better_than_ggmls(
    name: str, problem: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """The scales that its quantizer chooses are plain rounding's, also without their signs."""
    weights, codec, ggml = problem[0], codec_named(f"gguf:{name}"), GGMLQuantizationType[name]
    theirs = codec.unpack({"blocks": libgguf.quantize_rows(weights.numpy(), ggml).reshape(24, -1)}, 512)
    plain, fitted = minmax(codec, weights), fit(codec, weights, torch.ones(512))
    assert np.isclose(plain.numpy().scale.values(), theirs[0].scale.values(), rtol=1e-3).mean() > 0.98
    error = [
        float(np.square(values - weights.numpy()).sum())
        for values in (theirs[0].values(theirs[1]), fitted.values(fitted.nearest(weights)).numpy())
    ]
    assert error[1] < {"TQ2_0": 0.3, "Q1_0": 1.0001, "NVFP4": 0.8}[name] * error[0]


def test_powers_of_mxfp4_are_the_best_of_all(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The fit tries five powers of two. Trying all gives the same error, and ggml's rule for them a greater one."""
    weights = problem[0]
    codec = codec_named("gguf:MXFP4")
    grid = fitting.fit(codec, weights, torch.ones_like(weights[0]))
    fitted = (grid.values(grid.nearest(weights)) - weights).square().unflatten(1, (-1, 32)).sum(2)
    groups, least = weights.unflatten(1, (-1, 32)), torch.full_like(fitted, torch.inf)
    for power in range(-24, 16):
        level = fitting._chosen(groups, torch.full_like(least, 2.0**power), torch.zeros_like(least), grid.levels, False)
        least = least.minimum((2.0**power * level - groups).square().sum(2))
    torch.testing.assert_close(fitted, least)
    theirs = dequantize(quantize(weights.numpy(), GGMLQuantizationType.MXFP4), GGMLQuantizationType.MXFP4)
    assert float(fitted.sum()) < 0.97 * float(np.square(theirs - weights.numpy()).sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_affine_fit_does_not_lose_to_the_papers_search(
    bits: int, problem: tuple[torch.Tensor, torch.Tensor], load_script: Callable[[str], ModuleType]
) -> None:
    """With T = 64 the paper's search tries 26 x 26 ranges per group at 2 bits. Ours is also rounded to float16."""
    weights, hessian = problem
    reference = load_script("bench/affine_search.py")
    importances = hessian.diagonal().unflatten(0, (-1, 64))
    theirs = reference.paper_search(weights.unflatten(1, (-1, 64)), importances, bits, 64)
    ours = reference.our_error(weights, hessian.diagonal(), bits, 64)
    assert float(ours.sum()) <= 1.002 * float(theirs.sum())


def test_store_rounds_to_what_the_file_holds() -> None:
    form = codec_named("gguf:Q2_K").scale
    numbers = store(torch.tensor([[0.14, 0.3, 0.02] + [0.0] * 13]), form)
    assert numbers.supers.item() == np.float32(np.float16(0.02))
    assert numbers.subs[0, :3].tolist() == [7, 15, 1]


def test_store_weighs_what_it_rounds() -> None:
    form = codec_named("gguf:Q2_K").scale
    values = torch.rand(50, 16, generator=torch.Generator().manual_seed(0))
    weight = torch.tensor([100.0] + [1.0] * 15)

    def error(numbers: Numbers) -> torch.Tensor:
        return (weight * (numbers.values() - values).square()).sum(1)

    plain = values.amax(1, keepdim=True) / 15
    simple = Numbers(form, plain.half().float(), (values / plain).round().to(torch.int16))
    assert (error(store(values, form, weight)) <= 1.0001 * error(simple)).all()
    assert error(store(values, form, weight)).sum() < 0.5 * error(store(values, form)).sum()


def test_dampening_is_a_share_of_the_median_where_none_is_asked_for() -> None:
    """Neither a column that dominates the mean nor columns without input change the dampening."""
    hessian = torch.diag(torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 1000.0, 4.0]))
    cholesky = factorize(hessian, None, True)
    added = cholesky.dampening * hessian.diagonal().mean()
    assert float(added) == pytest.approx(SHARE_OF_MEDIAN * 3)
    assert torch.allclose(cholesky.diagonal(), (hessian.diagonal().double()[cholesky.order] + added).rsqrt())
    assert factorize(hessian, 0.1, True).dampening == 0.1
    assert factorize(torch.zeros(4, 4), None, True).diagonal().tolist() == [1] * 4


def test_dampening_rises_until_the_factorization_succeeds() -> None:
    hessian = torch.ones(8, 8, dtype=torch.float64)
    hessian[0, 1] = hessian[1, 0] = 3  # not positive semidefinite
    cholesky = factorize(hessian, 0.01, False)
    assert cholesky.dampening > 0.01
    (upper,) = cholesky.panels
    eye = upper.T @ upper @ solve.damped(hessian, cholesky.dampening)
    torch.testing.assert_close(eye, torch.eye(8, dtype=torch.float64), atol=1e-8, rtol=0)
    with pytest.raises(UserError, match="finite"):
        factorize(torch.full((4, 4), torch.nan, dtype=torch.float64), 0.01, False)


def test_act_order_goes_by_the_diagonal(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, hessian = problem
    cholesky = factorize(hessian.double(), 0.01, True)
    diagonal = hessian.diagonal()[cholesky.order]
    assert bool((diagonal[:-1] >= diagonal[1:]).all())


def test_importance_conventions(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Checks `cholesky` (U_ii of H^-1 = U^T U) and `inverse` (the diagonal of H^-1), in the Cholesky factor's order."""
    _, hessian = problem
    cholesky = factorize(hessian.double(), 0.01, True)
    inverse = torch.linalg.inv(solve.damped(hessian.double(), 0.01))
    expected = inverse.diagonal().pow(-2.0)
    torch.testing.assert_close(
        importance(hessian, cholesky, "inverse", 2.0), (expected / expected.max()).float(), rtol=1e-4, atol=0
    )
    ordered = inverse[cholesky.order][:, cholesky.order]
    upper = torch.linalg.cholesky(ordered, upper=True).diagonal()
    expected = torch.empty_like(upper)
    expected[cholesky.order] = upper.pow(-4.0)
    actual = importance(hessian, cholesky, "cholesky", 4.0)
    torch.testing.assert_close(actual, (expected / expected.max()).float(), rtol=1e-3, atol=0)


def test_normalized_moments_weigh_tokens_alike() -> None:
    inputs = torch.tensor([[3.0, 4.0], [0.0, 100.0], [0.0, 0.0]])
    moments = SecondMoments(2, "normalized", torch.device("cpu"))
    moments.add(inputs[None])
    torch.testing.assert_close(moments.hessian() * 3, torch.tensor([[0.36, 0.48], [0.48, 1.64]]))


def test_zero_inputs_and_zero_weights_survive() -> None:
    weights = torch.zeros(4, 256)
    weights[1, :] = 1e-9
    for name in FEW:
        grid = fit(codec_named(name), weights, torch.zeros(256))
        codes = solve.feedback(weights, grid, factorize(torch.zeros(256, 256, dtype=torch.float64), 0.01, True))
        grid, codes = solve.refine(weights, torch.eye(256), grid, codes, sweeps=1, refit=True)
        assert float((grid.values(codes) - weights).abs().max()) <= 1e-6


@pytest.mark.parametrize("name", ["native:table-2", "native:table-3", "native:table-4"])
def test_refitted_tables_are_the_least_squares_ones(name: str, problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Compares refitted tables with a general least-squares solver, row by row with fixed codes.

    The refit also lowers the loss of refinement.
    """
    weights, hessian = problem
    hessian = solve.damped(hessian, 0.01)
    grid, codes = solved(name, weights, hessian)
    refitted, moved = solve.refit_tables((grid.values(codes) - weights) @ hessian, hessian, grid, codes)
    root = torch.linalg.cholesky(hessian.double()).T
    for row in (0, 11):
        indicator = torch.nn.functional.one_hot(codes[row].long(), grid.levels.shape[1]).double()
        best = torch.linalg.lstsq(root @ indicator, root @ weights[row].double()).solution
        least = (root @ (indicator @ best - weights[row].double())).square().sum()
        reached = (root @ (refitted.values(moved)[row].double() - weights[row].double())).square().sum()
        assert reached <= 1.001 * least
    alone, with_refit = (solve.refine(weights, hessian, grid, codes, sweeps=3, refit=refit) for refit in (False, True))
    assert loss(*with_refit, weights, hessian) < loss(*alone, weights, hessian)


@pytest.mark.parametrize("shape", [(3, 5, 4), (19, 1100, 16)])
def test_table_products_are_those_of_the_indicators(shape: tuple[int, int, int]) -> None:
    rows, columns, count = shape
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(columns, columns, generator=generator)
    codes = torch.randint(count, (rows, columns), generator=generator).to(torch.uint8)
    indicators = torch.nn.functional.one_hot(codes.long(), count).double()
    expected = torch.einsum("rck,cd,rdl->rkl", indicators, (half + half.T).double(), indicators)
    for backend in (solve_cpu, solve_torch):
        products = backend.table_products(half + half.T, codes, count)
        assert torch.allclose(products, expected, rtol=1e-4, atol=1e-2)


def test_a_level_without_codes_stays() -> None:
    grid = TensorGrid(4, torch.tensor([[-1.0, 0.0, 1.0, 2.0]]).repeat(2, 1), False)
    codes = torch.tensor([[0, 0, 2, 2], [1, 1, 1, 1]], dtype=torch.uint8)
    weights = torch.tensor([[-1.25, -1.25, 1.5, 1.5], [3.0, 3.0, 3.0, 3.0]])
    refitted, moved = solve.refit_tables(grid.values(codes) - weights, torch.eye(4), grid, codes)
    assert torch.equal(refitted.values(moved), weights)
    assert refitted.levels.tolist() == [[-1.25, 0.0, 1.5, 2.0], [-1.0, 1.0, 2.0, 3.0]]
