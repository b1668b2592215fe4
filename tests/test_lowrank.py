"""Low-rank corrections: their optimality, their tensors in a run, and how a number of bytes is shared among them."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corrected_models import Q
from corrected_models import corrected as corrected
from corrected_models import options as options

from lqexport.calibration.collect import input_magnitudes
from lqexport.converters.factors import factor_names, is_factor
from lqexport.errors import UserError
from lqexport.formats.codec import nbytes
from lqexport.formats.registry import codec_named
from lqexport.models.blocks import BlockModel
from lqexport.models.source import open_source
from lqexport.pipeline.quantize import quantize
from lqexport.pipeline.ranks import Candidate, allocate_steps
from lqexport.recipe import Recipe
from lqexport.solver.corrected_linear import solve_corrected
from lqexport.solver.lowrank import column_weighting, correction, loss_by_rank
from lqexport.storage.artifact import Artifact, values_of

SCALINGS = ("lqer", "l2qer", "qera-diag", "qera")


# The correction itself.


@pytest.fixture(scope="module", params=[(60, 90), (90, 60), (300, 400)], ids=str)
def problem(request: pytest.FixtureRequest) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An error [R, C], the Hessian of correlated inputs (one is always zero), and the inputs' mean magnitudes."""
    rows, columns = request.param
    draw = torch.Generator().manual_seed(rows)
    mixing = torch.randn(columns, columns, generator=draw) * torch.rand(columns, generator=draw).pow(3)
    inputs = torch.randn(2000, columns, generator=draw) @ mixing
    inputs[:, 7] = 0
    return torch.randn(rows, columns, generator=draw), inputs.T @ inputs / 2000, inputs.abs().mean(0)


def reference(error: torch.Tensor, weighting: torch.Tensor, rank: int) -> torch.Tensor:
    """Returns LQER's correction by a full SVD: E S = U D V^T and B A = U_k D_k V_k^T S^+.

    S is the symmetric root of the weighting.
    """
    matrix = weighting if weighting.ndim == 2 else weighting.diag()
    values, vectors = torch.linalg.eigh(matrix)
    sizes = values.clamp_min(0).sqrt()
    inverse = torch.where(sizes > 1e-6 * sizes.max(), 1 / sizes, 0)
    u, d, vt = torch.linalg.svd(error.double() @ (vectors * sizes) @ vectors.T, full_matrices=False)
    return (u[:, :rank] * d[:rank]) @ vt[:rank] @ (vectors * inverse) @ vectors.T


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_correction_is_the_svds(problem: tuple[torch.Tensor, ...], scaling: Any) -> None:
    error, hessian, magnitudes = problem
    weighting = column_weighting(scaling, hessian, magnitudes)
    up, down = correction(error, weighting, 8)
    assert (up.shape, down.shape) == ((len(error), 8), (8, error.shape[1]))
    assert float(up.norm()) == pytest.approx(float(down.norm()), rel=1e-4)

    def loss_with(product: torch.Tensor) -> float:
        remaining = error.double() - product
        return float(((remaining @ (weighting if weighting.ndim == 2 else weighting.diag())) * remaining).sum())

    best = loss_with(reference(error, weighting, 8))
    assert best * (1 - 1e-6) < loss_with(up.double() @ down.double()) < best * 1.001 < loss_with(torch.zeros(1))


def test_only_the_second_moments_themselves_give_the_least_loss(problem: tuple[torch.Tensor, ...]) -> None:
    error, hessian, magnitudes = problem
    losses = {}
    for scaling in SCALINGS:
        factors = correction(error, column_weighting(scaling, hessian, magnitudes), 8)
        losses[scaling] = float(loss_by_rank(error, hessian, *factors)[-1])
    assert all(losses["qera"] < 0.99 * loss for scaling, loss in losses.items() if scaling != "qera")
    assert losses["qera-diag"] < losses["lqer"]


def test_a_rank_beyond_what_the_inputs_show_stays_finite() -> None:
    """Second moments of few tokens are singular, and an error may have parts that they do not see."""
    draw = torch.Generator().manual_seed(0)
    error, inputs = torch.randn(24, 40, generator=draw), torch.randn(12, 40, generator=draw)
    hessian = inputs.double().T @ inputs.double()
    up, down = correction(error, hessian, 24)
    assert float(max(up.abs().max(), down.abs().max())) < 100
    assert not up[:, 12:].any()
    losses = loss_by_rank(error, hessian, up, down).tolist()
    assert abs(losses[-1]) < 1e-6 * losses[0]


def test_losses_by_rank_are_those_of_the_cut_factors(problem: tuple[torch.Tensor, ...]) -> None:
    error, hessian, _ = problem
    up, down = (factor.half().double() for factor in correction(error, hessian.double(), 6))
    losses = loss_by_rank(error, hessian, up, down)
    for rank in range(7):
        remaining = error.double() - up[:, :rank] @ down[:rank]
        assert float(losses[rank]) == pytest.approx(float(((remaining @ hessian.double()) * remaining).sum()), rel=1e-9)
    assert torch.all(losses.diff() < 0)
    assert torch.all(losses.diff().diff() > 0), "gains fall from rank to rank, which `allocate` rests on"


def test_no_error_needs_no_correction() -> None:
    up, down = correction(torch.zeros(20, 30), torch.eye(30, dtype=torch.float64), 4)
    assert torch.isfinite(up).all()
    assert torch.isfinite(down).all()
    assert float((up @ down).abs().max()) == 0


# A number of bytes shared among the linears.


def falling(draw: np.random.Generator, steps: int) -> list[float]:
    gains = np.sort(draw.random(steps))[::-1]
    return [float(value) for value in gains.sum() - np.concatenate([[0], np.cumsum(gains)])]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("largest", [1, 4])
def test_no_other_choice_of_the_budget_gains_more(seed: int, largest: int) -> None:
    """No other choice gains more if all steps take the same bytes.

    Otherwise none gains more by a whole step, which may not fit.
    """
    draw = np.random.default_rng(seed)
    candidates = {name: Candidate(falling(draw, 4), int(draw.integers(1, largest, endpoint=True))) for name in "abcd"}
    budget = 4 * largest + 2

    def total(steps: dict[str, int]) -> tuple[int, float]:
        used = sum(steps[name] * one.nbytes for name, one in candidates.items())
        return used, sum(one.losses[steps[name]] for name, one in candidates.items())

    used, loss = total(allocate_steps(candidates, budget))
    assert used <= budget
    every = (total(dict(zip("abcd", steps, strict=True))) for steps in itertools.product(range(5), repeat=4))
    best = min(choice_loss for choice_bytes, choice_loss in every if choice_bytes <= budget)
    step = max(one.losses[0] - one.losses[1] for one in candidates.values())
    assert loss == pytest.approx(best) if largest == 1 else loss < best + step


def test_a_step_that_gains_nothing_is_not_taken() -> None:
    assert allocate_steps({"a": Candidate([1.0, 0.5, 0.5], 1), "b": Candidate([1.0, 1.0], 1)}, 10) == {"a": 1, "b": 0}


# In a run.


def linear_entries(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in report["tensors"] if "correction" in entry]


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "log.jsonl"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_factors_are_tensors_of_their_own(corrected: Artifact) -> None:
    manifest, report = corrected.manifest(), corrected.report()
    assert sum(map(is_factor, manifest)) == 2 * 14
    for entry in linear_entries(report):
        down, up = factor_names(entry["name"])
        rows, columns = entry["shape"]
        assert (manifest[down]["shape"], manifest[up]["shape"]) == ([16, columns], [rows, 16])
        losses = entry["correction"]["losses"]
        assert len(losses) == 17
        assert losses[0] == pytest.approx(entry["loss"], rel=1e-4)
        assert 0 < losses[-1] < 0.9 * losses[0]
    sizes = {name: nbytes(codec_named(e["codec"]), *([1, *e["shape"]][-2:])) for name, e in manifest.items()}
    assert report["correction"]["factor_bytes"] == sum(size for name, size in sizes.items() if is_factor(name))
    assert report["correction"]["base_bytes"] == sum(size for name, size in sizes.items() if not is_factor(name))


@pytest.mark.parametrize("method", ["rtn", "lean"])
def test_every_method_can_be_corrected(options: dict[str, Any], method: str, tmp_path: Path) -> None:
    correction = quantize(Recipe(**options | {"method": method, "tune": 0}, rank=8), tmp_path / "out")["correction"]
    assert correction["corrected"] < 0.9 * correction["alone"]


def test_l2qer_takes_the_largest_mean_magnitude_of_any_sequence(
    options: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    tokens, seen = torch.arange(96).reshape(3, 32), []
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model.get_submodule(Q.removesuffix(".weight")).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    blocks = BlockModel(open_source(str(tiny_model)))
    with torch.no_grad():
        model(tokens)
        magnitudes = input_magnitudes(blocks, tokens)
    torch.testing.assert_close(magnitudes[Q], seen[0].abs().mean(1).amax(0), rtol=1e-4, atol=1e-5)
    report = quantize(Recipe(**options, rank=8, scaling="l2qer"), tmp_path / "out")
    assert report["correction"]["corrected"] < report["correction"]["alone"]


@pytest.mark.parametrize("factors", ["Q8_0", "native:mxint-8-g16", "BF16"])
def test_factors_of_every_type_lose_little(
    corrected: Artifact, options: dict[str, Any], factors: str, tmp_path: Path
) -> None:
    rank = 32 if factors == "Q8_0" else 16
    report = quantize(Recipe(**options, rank=rank, factors=factors), tmp_path / "out")
    codec_names = {entry["codec"] for name, entry in Artifact(tmp_path / "out").manifest().items() if is_factor(name)}
    assert codec_names == {factors if ":" in factors else f"gguf:{factors}"}
    expected = corrected.report()["correction"]["corrected"]
    assert report["correction"]["corrected"] < 1.02 * expected


def test_rounds_make_room_for_the_correction() -> None:
    draw = torch.Generator().manual_seed(2)
    mixing = torch.randn(256, 256, generator=draw) * torch.rand(256, generator=draw).pow(3)
    inputs = torch.randn(2000, 256, generator=draw) @ mixing
    weight, hessian = torch.randn(48, 256, generator=draw), inputs.T @ inputs / 2000
    losses = {}
    for rounds in (1, 3):
        recipe = Recipe("", "gguf:Q2_K", rank=8, rounds=rounds)
        *_, solved = solve_corrected(
            "w.weight", weight, hessian, None, "gguf:Q2_K", recipe.solver_settings, recipe.correction_settings
        )
        losses[rounds] = solved.facts["correction"]["losses"]
    assert losses[3][-1] < 0.97 * losses[1][-1]
    assert losses[3][0] > losses[1][0], "the codes alone are no longer the best"


def test_output_groups_have_losses_of_their_own() -> None:
    draw = torch.Generator().manual_seed(2)
    weight, inputs = torch.randn(48, 256, generator=draw), torch.randn(2, 900, 256, generator=draw)
    inputs[1] *= torch.rand(256, generator=draw).pow(2)
    hessians = inputs.mT @ inputs / 900
    recipe = Recipe("", "gguf:Q3_K", method="gptq", rank=8, factors="F32")
    down, up, solved = solve_corrected(
        "w.weight", weight, hessians, None, "gguf:Q3_K", recipe.solver_settings, recipe.correction_settings
    )
    remaining = weight - values_of(solved) - values_of(up) @ values_of(down)
    expected = sum(float(((part @ h) * part).sum()) for part, h in zip(remaining.chunk(2), hessians, strict=True))
    assert solved.facts["correction"]["losses"][-1] == pytest.approx(expected, rel=1e-4)


def test_tuning_sees_the_corrections(options: dict[str, Any], tmp_path: Path) -> None:
    divergences = {}
    for rank in (0, 32):
        report = quantize(Recipe(**options | {"tune": 4}, rank=rank), tmp_path / str(rank))
        divergences[rank] = report["tuning"]["held_out_kl_before"]
    assert divergences[32] < 0.95 * divergences[0]


def test_merging_stores_no_factors_and_says_what_it_costs(options: dict[str, Any], tmp_path: Path) -> None:
    """With prefix full, no linear sees what was merged before it, so the losses can be compared."""
    options = options | {"prefix": "full", "rank": 16}
    merged = quantize(Recipe(**options, merge=True), tmp_path / "out")["correction"]
    assert not any(map(is_factor, Artifact(tmp_path / "out").manifest()))
    beside = quantize(Recipe(**options), tmp_path / "beside")["correction"]
    assert (merged["factor_bytes"], merged["base_bytes"]) == (0, beside["base_bytes"])
    assert merged["corrected"] == beside["corrected"]
    assert merged["merged"] > merged["corrected"]


def test_bytes_are_shared_and_a_stopped_run_shares_them_alike(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(**options, rank=32, factor_bytes=100_000)
    report = quantize(recipe, tmp_path / "whole")
    ranks = [entry["correction"]["rank"] for entry in linear_entries(report)]
    assert len(set(ranks)) > 2
    assert 90_000 < report["correction"]["factor_bytes"] <= 100_000
    uniform = 100_000 / (2 * sum(sum(entry["shape"]) for entry in linear_entries(report)))
    losses = [
        entry["correction"]["losses"][int(uniform)] / entry["correction"]["energy"] for entry in linear_entries(report)
    ]
    assert report["correction"]["corrected"] < np.mean(losses)
    for method, stop in (("write", 30), ("write", 50), ("remove", 3)):
        original, calls_left = getattr(Artifact, method), [stop]

        def until(self: Artifact, argument: Any, original: Any = original, calls_left: list[int] = calls_left) -> None:
            calls_left[0] -= 1
            if calls_left[0] < 0:
                raise KeyboardInterrupt
            original(self, argument)

        monkeypatch.setattr(Artifact, method, until)
        folder = tmp_path / f"{method}{stop}"
        with pytest.raises(KeyboardInterrupt):
            quantize(recipe, folder)
        monkeypatch.setattr(Artifact, method, original)
        quantize(recipe, folder)
        assert contents(folder) == contents(tmp_path / "whole")


def test_later_blocks_see_the_corrected_weights(options: dict[str, Any], tmp_path: Path) -> None:
    stored = {}
    for rank in (0, 16):
        quantize(Recipe(**options, prefix="quantized", rank=rank), tmp_path / str(rank))
        stored[rank] = Artifact(tmp_path / str(rank)).manifest()
    first = "model.layers.0.self_attn.q_proj.weight"
    assert stored[0][first] == stored[16][first]
    assert stored[0][Q] != stored[16][Q]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 16, "factors": "Q8_0"}, "multiple of 32, not 16"),
        ({"rank": 16, "factors": "Q9"}, "Unknown format"),
        ({"rank": 16, "factors": "native:table-4"}, "numbers per block"),
        ({"rank": 500}, "no smaller than it"),
        ({"rank": 8, "target": "gguf:F16"}, "Nothing to correct"),
        ({"rank": 8, "scaling": "svd"}, "scaling cannot be 'svd'"),
        ({"rounds": 2}, "give its rank too"),
        ({"rank": 8, "merge": True, "factor_bytes": 9}, "give one of them"),
        ({"rank": 8, "prefix": "quantized", "factor_bytes": 9}, "take prefix full"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    options: dict[str, Any], given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        quantize(Recipe(**options | given), tmp_path / "out")
    assert not (tmp_path / "out").exists()
