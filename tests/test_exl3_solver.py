"""The solver of EXL3's linears: its basis, block LDL, feedback, sweeps and refits, and whole linears."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from lqexport.formats.exl3 import EXL3
from lqexport.formats.registry import codec_named
from lqexport.formats.trellis import DISTORTION, Walks
from lqexport.grids.rotation import Basis, TensorWalks, _even, fit_basis, random_signs, rotated, unscaled
from lqexport.recipe import Recipe
from lqexport.solver.feedback import layer_loss
from lqexport.solver.linear import solve_linear
from lqexport.solver.solve_trellis import Encoder, block_ldl, feedback, sweep
from lqexport.solver.trellis_linear import refitted
from lqexport.storage.artifact import StoredTensor, decoded

SETTINGS = Recipe("model", "gguf:Q4_K").solver_settings
ROWS, COLUMNS = 96, 200


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(rows: int = ROWS, columns: int = COLUMNS) -> tuple[Tensor, Tensor]:
    """Returns weights of rows and columns of different sizes, and second moments of correlated inputs."""
    weight = normal(1, rows, columns) * torch.linspace(0.5, 2, columns) * torch.linspace(2, 0.7, rows)[:, None] * 0.02
    inputs = normal(2, 600, columns) + normal(3, 600, 1) * torch.linspace(-1, 2, columns)
    return weight, inputs.T @ inputs / 600


def solved(weight: Tensor, hessian: Tensor | None, codec_name: str = "exl3:2", descent: int = 2) -> StoredTensor:
    settings = replace(SETTINGS, descent=descent)
    return solve_linear("linear", weight, hessian, codec_name, settings)


def loss_of(stored: StoredTensor, weight: Tensor, hessian: Tensor) -> float:
    return layer_loss(torch.from_numpy(decoded(stored)) - weight, hessian)


def in_basis() -> tuple[Basis, Tensor, Tensor]:
    """Returns the basis of the problem, X and M."""
    weight, hessian = problem()
    basis = fit_basis(weight, hessian.diagonal(), 1.0)
    return basis, basis.into(weight), basis.moments(hessian + 0.1 * torch.eye(COLUMNS), 0.1)


# The basis.


def test_the_weights_come_back_out_of_the_basis() -> None:
    basis, aim, _ = in_basis()
    back = basis.out_of(aim) * basis.inputs * basis.outputs[:, None]
    assert aim.shape == (256, 128)
    assert torch.allclose(back, problem()[0], atol=1e-6)


def test_runs_of_the_rotated_weights_have_the_deviation_that_was_asked_for() -> None:
    weight = problem(256, 384)[0]
    aim = fit_basis(weight, torch.linspace(0.01, 3, 384), 0.9).into(weight)
    runs = aim.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
    assert torch.allclose(runs.square().mean((1, 3)).sqrt(), torch.tensor(0.9), rtol=0.03)


def test_the_loss_in_the_basis_is_the_loss_of_the_weights() -> None:
    """With scales of outputs that are all alike, which the loss in the basis leaves out."""
    weight, hessian = problem()
    basis = fit_basis(weight, hessian.diagonal(), 1.0)
    error, moments = normal(4, 256, 128), basis.moments(hessian, 0.0)
    in_weights = layer_loss(basis.out_of(error) * basis.inputs, hessian)
    outside = rotated(rotated(error).T)[ROWS:].T  # the outputs of the padding
    beyond = float((rotated(rotated(moments.float()).T) * (outside @ outside.T)).sum())
    assert float((moments.float() * (error @ error.T)).sum()) == pytest.approx(in_weights + beyond, rel=1e-3)


def test_inputs_that_count_more_get_finer_scales() -> None:
    weight = normal(5, 128, 128)
    importance = torch.ones(128)
    importance[7] = 100.0
    scales = fit_basis(weight, importance, 1.0).inputs.abs()
    assert scales[7] < 0.7 * scales.median()


def energies(rows: Tensor) -> Tensor:
    """Returns the energy of each rotated row, over their mean in its run."""
    squares = rotated(rows).square().sum(1).unflatten(0, (-1, 128))
    return squares / squares.mean(1, keepdim=True)


def test_signs_spread_rows_that_have_much_in_common_evenly() -> None:
    rows = normal(8, 256, 64) * 0.5 + normal(9, 1, 64)
    signs = random_signs(torch.ones(256), 1)
    even = _even(rows * signs[:, None]) * signs
    assert set(even.tolist()) == {1.0, -1.0}
    before, after = (energies(rows * each[:, None]).var(1) for each in (signs, even))
    assert (after < 0.4 * before).all()


def test_one_more_flipped_sign_makes_nothing_more_even() -> None:
    rows = normal(10, 128, 8) + 1
    signs = _even(rows)
    least = float(energies(rows * signs[:, None]).var())
    for index in range(128):
        flipped = signs.clone()
        flipped[index] *= -1
        assert float(energies(rows * flipped[:, None]).var()) > least * (1 - 1e-3)


def test_an_embedding_whose_rows_have_much_in_common_loses_what_gaussian_weights_lose() -> None:
    weight = (normal(11, 128, 256) + normal(12, 1, 256)) * 0.05
    stored = solved(weight, None, "exl3:6", descent=0)
    error = float((torch.from_numpy(decoded(stored)) - weight).square().sum() / weight.square().sum())
    assert error < 1.2 * DISTORTION[6]


@pytest.mark.parametrize("rows", [1, 130])
def test_inputs_and_outputs_of_zeros_have_a_basis(rows: int) -> None:
    weight = torch.zeros(rows, 130)
    for filled in (weight, weight.index_fill(1, torch.tensor([3]), 0.5)):
        basis = fit_basis(filled, torch.ones(130), 1.0)
        aim = basis.into(filled)
        assert aim.isfinite().all()
        assert torch.allclose(basis.out_of(aim) * basis.inputs * basis.outputs[:, None], filled, atol=1e-5)


def test_tuning_sees_the_weights_that_the_file_holds() -> None:
    draw = np.random.default_rng(7)
    walks = solved_walks(draw)
    values = TensorWalks.of(walks, torch.device("cpu")).values(torch.from_numpy(unscaled(walks)))
    exact = torch.from_numpy(walks.values())
    assert float((values - exact).norm() / exact.norm()) < 6e-4


def solved_walks(draw: np.random.Generator) -> Walks:
    trellis = EXL3["exl3:3"].trellis
    rings = draw.integers(-(2**15), 2**15, (8, 16, trellis.words)).astype(np.int16)
    scales = [(draw.normal(size=size) * 0.1).astype(np.float16) for size in (100, 200)]
    return Walks(trellis, trellis.unpack(rings), *scales)


# Feedback and sweeps.


def test_block_ldl_is_a_factorization() -> None:
    moments = in_basis()[2]
    lower, diagonal = block_ldl(moments)
    blocks = [slice(start, start + 16) for start in range(0, 256, 16)]
    for block in blocks:
        assert torch.allclose(lower[block, block], torch.eye(16), atol=1e-6)
        assert not lower[block, block.stop :].any()
    inverse = torch.linalg.inv(lower.double())
    middle = inverse @ moments @ inverse.T
    assert torch.allclose(middle.diagonal().float(), diagonal, rtol=1e-4)
    for block in blocks:
        middle[block, block] = 0
    assert middle.abs().max() < 1e-5 * diagonal.max()


def test_feedback_lowers_the_loss_and_sweeps_never_raise_it() -> None:
    _, aim, moments = in_basis()
    encoder = Encoder(EXL3["exl3:2"].trellis)

    def loss(values: Tensor) -> float:
        error = (aim - values).double()
        return float((moments * (error @ error.T)).sum())

    alone = feedback(aim, torch.eye(256).double(), encoder)[0]
    values, states = feedback(aim, moments, encoder)
    losses = [loss(alone), loss(values)]
    assert losses[1] < 0.8 * losses[0]
    for seam in (128, 0):
        sweep(aim, moments.float(), values, states, encoder, seam)
        losses.append(loss(values))
    assert losses[3] <= losses[2] * (1 + 1e-6)
    assert losses[2] < losses[1]
    trellis = EXL3["exl3:2"].trellis
    assert trellis.walks(states).all()
    assert torch.equal(encoder.nearest(values[:16], torch.ones(16), states[0].copy(), seam=0), values[:16])


def test_refitted_scales_lower_the_loss() -> None:
    weight, hessian = problem()
    basis = fit_basis(weight, hessian.diagonal(), 1.0)
    values = basis.out_of(basis.into(weight) + 0.3 * normal(6, 256, 128))
    new = refitted(basis, values, weight, hessian)

    def loss(scales: Basis) -> float:
        return layer_loss(values * scales.inputs * scales.outputs[:, None] - weight, hessian)

    assert loss(new) < 0.97 * loss(basis)
    for factor in (0.99, 1.01):
        moved = new.inputs.clone()
        moved[5] *= factor
        assert loss(Basis(moved, new.outputs)) > loss(new) * (1 - 1e-6)


# Whole linears.


@pytest.mark.parametrize(("name", "error"), [("exl3:1", 0.29), ("exl3:2.5", 0.038), ("exl3:4", 0.0052)])
def test_rounding_without_moments_leaves_the_formats_error(name: str, error: float) -> None:
    weight = problem(128, 128)[0]
    stored = solve_linear("linear", weight, None, name, replace(SETTINGS, method="rtn"))
    assert stored.facts["weight_error"] < error


def test_the_solvers_steps_lower_the_loss_of_a_linear() -> None:
    weight, hessian = problem()
    plain = solved(weight, None)
    fed, refined = (solved(weight, hessian, descent=descent) for descent in (0, 2))
    losses = [loss_of(stored, weight, hessian) for stored in (plain, fed, refined)]
    assert losses[1] < 0.8 * losses[0]
    assert losses[2] < losses[1]
    assert refined.facts["loss"] == pytest.approx(losses[2], rel=1e-3)
    assert refined.shape == (ROWS, COLUMNS)
    codec = codec_named("exl3:2")
    layout = codec.layout(ROWS, COLUMNS)
    assert {plane: (array.dtype, array.shape) for plane, array in refined.planes.items()} == layout


def test_linears_with_nothing_in_them_are_solved() -> None:
    weight, hessian = problem()
    silent = hessian.clone()
    silent[:, 5] = silent[5] = 0
    assert solved(weight, silent).facts["relative_error"] < 0.2
    assert not decoded(solved(torch.zeros_like(weight), hessian)).any()
    assert solved(weight, torch.zeros_like(hessian)).facts["weight_error"] < 0.1
    lone = torch.zeros_like(weight)
    lone[3] = weight[3]
    values = decoded(solved(lone, hessian, "exl3:4"))
    assert np.abs(values[:3]).max() < 0.1 * np.abs(values[3]).max()


def test_targets_beyond_the_codebook_take_its_ends() -> None:
    """At 8 bits costs are cut off soon. All states would cost the same, and any of them would be taken."""
    trellis = EXL3["exl3:8"].trellis
    target = 0.5 * normal(5, 16, 16)
    target[3, 4], target[7, 0] = 6.0, -9.0
    values = Encoder(trellis).nearest(target, torch.ones(16), np.empty((1, 256), np.uint16))
    assert values[3, 4] > 0.9 * trellis.table.max()
    assert values[7, 0] < 0.9 * trellis.table.min()
