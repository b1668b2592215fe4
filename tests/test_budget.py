"""A byte budget: how a size is read, and a choice of types that keeps within it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lqexport.cli.app import app
from lqexport.converters.gguf.writer import write
from lqexport.converters.plan import PlannedTensor
from lqexport.errors import UserError
from lqexport.formats.registry import names
from lqexport.models.inspect import inspect
from lqexport.models.inspect import size as bytes_of
from lqexport.models.source import open_source
from lqexport.pipeline.measured_losses import MeasuredLosses
from lqexport.pipeline.quantize import quantize
from lqexport.pipeline.type_losses import type_losses
from lqexport.planning import recipe_plan
from lqexport.planning.dryrun import preview
from lqexport.planning.recipe_plan import plan_recipe
from lqexport.planning.type_choices import RELATIVES, choices_of
from lqexport.recipe import Recipe
from lqexport.sizes import model_size
from lqexport.solver.linear import solve_linear
from lqexport.storage.artifact import Artifact


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4.25bpw", 4250),
        ("4 bpw", 4000),
        ("3.9GB", 3_900_000_000),
        ("2MiB", 2 << 20),
        ("700 kb", 700_000),
        ("Q4_K_M", 77),
        ("iq2m", 55),
    ],
)
def test_a_size_means_bytes(text: str, expected: int) -> None:
    assert model_size(text, 8000, {"gguf:Q4_K_M": 77, "gguf:IQ2_M": 55}.__getitem__) == expected


def test_a_size_alone_is_a_target() -> None:
    assert Recipe("model", size="4.25bpw").target == "gguf:auto"
    assert Recipe("model", "mlx:auto", size="4.25bpw").target == "mlx:auto"
    assert Recipe("model", bits=3.5).target == "exl2"
    with pytest.raises(UserError, match="No target: give --target"):
        Recipe("model")


@pytest.mark.parametrize("text", ["4.2.1bpw", "12", "5 apples", "5IB"])
def test_what_is_no_size_is_said(text: str) -> None:
    with pytest.raises(UserError, match="size"):
        model_size(text, 8000, lambda _: 0)


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        ("Q2_0", "Q2_0 cannot be chosen"),
        ("Q4_K_Z", "Unknown target"),
        ("12", "A size is"),
        ("1.5bpw", r"take 278.5 kB \(1.698 bits per weight\), and --size 1.5bpw is 246.0 kB. Give a larger"),
    ],
)
def test_a_size_is_checked_before_any_work(size: str, sentence: str, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        preview(Recipe(str(tiny_model), "gguf:auto", size=size), tmp_path)


def test_the_plan_of_a_size_says_no_more_than_the_size(tiny_model: Path, tmp_path: Path) -> None:
    """The types are not chosen yet, and those that the plan shows take more."""
    shown = preview(Recipe(str(tiny_model), "gguf:auto", size="700kB"), tmp_path)
    assert bytes_of(shown.entries) > 1_000_000
    assert shown.tensor_bytes == shown.missing_bytes == 700_000
    assert shown.bits_per_weight == pytest.approx(700_000 * 8 / sum(tensor.weights for tensor in shown.tensors))
    larger = preview(Recipe(str(tiny_model), "gguf:auto", size="2MB"), tmp_path)
    assert larger.tensor_bytes == bytes_of(larger.entries)


def test_a_dry_run_plans_the_mix_of_a_size_once(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = []
    monkeypatch.setattr(recipe_plan, "plan_recipe", lambda *given: planned.append(given) or plan_recipe(*given))
    preview(Recipe(str(tiny_model), "gguf:auto", size="Q3_K_M"), tmp_path)
    assert [recipe.target for _, recipe in planned] == ["gguf:Q3_K_M"]


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Recipe:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog, " * 400)
    return Recipe(str(tiny_model), "gguf:auto", calibration=str(tmp_path / "text.txt"), samples=4, sequence_length=32,
                  moments="guided", tune=0, size="Q3_K_M")  # fmt: skip


def test_the_choice_keeps_within_a_mix(recipe: Recipe, tmp_path: Path) -> None:
    report = quantize(recipe, tmp_path / "out")
    budget = report["budget"]
    mix = plan_recipe(open_source(recipe.source), Recipe(recipe.source, "gguf:Q3_K_M"))
    assert budget["limit_bytes"] == sum(tensor.nbytes for tensor in mix)
    assert 0.9 * budget["limit_bytes"] < budget["tensor_bytes"] <= budget["limit_bytes"]
    assert sum(tensor["bytes"] for tensor in report["tensors"]) == budget["tensor_bytes"]
    loss_of_mix = sum(
        budget["losses"][tensor.name][tensor.codec_name] for tensor in mix if tensor.name in budget["losses"]
    )
    assert budget["predicted_kl"] <= loss_of_mix
    chosen = {tensor["codec"] for tensor in report["tensors"]}
    assert len(chosen) > 2
    assert {"gguf:IQ3_S", "gguf:IQ3_XXS"} & chosen
    losses = [point["loss"] for point in budget["curve"]]
    assert losses == sorted(losses, reverse=True)
    write(Artifact(tmp_path / "out"), tmp_path / "out.gguf")
    assert sum(entry.nbytes for entry in inspect(tmp_path / "out.gguf").entries) == budget["tensor_bytes"]


def test_a_type_by_hand_is_kept(recipe: Recipe, tmp_path: Path) -> None:
    types = ["*.down_proj.weight=Q6_K", "model.layers.0.mlp.down_proj.weight=gguf:Q2_K"]
    options = {"types": types, "size": "5.5bpw", "without": "iq"}
    report = quantize(Recipe(**{**vars(recipe), **options}), tmp_path / "out")
    codec_names = {tensor["name"]: tensor["codec"] for tensor in report["tensors"]}
    assert codec_names["model.layers.0.mlp.down_proj.weight"] == "gguf:Q2_K"
    assert codec_names["model.layers.1.mlp.down_proj.weight"] == "gguf:Q6_K"
    assert not any("down_proj" in name for name in report["budget"]["losses"])
    assert not any(codec.startswith("gguf:IQ") for losses in report["budget"]["losses"].values() for codec in losses)


def test_small_types_are_choices_at_small_sizes_alone() -> None:
    wide, narrow = (PlannedTensor("a", (256, columns), "gguf:Q8_0", True) for columns in (256, 96))
    large, small, smallest = (set(choices_of(wide, bits, False)) for bits in (4.5, 3.5, 2.5))
    assert small - large == {"gguf:IQ2_S", "gguf:IQ2_XS", "gguf:IQ2_XXS"}
    assert smallest - small == {"gguf:IQ1_S", "gguf:IQ1_M"}
    assert large - set(choices_of(wide, 4.5, True)) == {"gguf:IQ4_XS", "gguf:IQ3_S", "gguf:IQ3_XXS"}
    assert set(choices_of(narrow, 2.5, False)) - set(choices_of(narrow, 2.5, True)) == {"gguf:IQ4_NL"}
    output = PlannedTensor("b", (512, 256), "gguf:Q8_0", False)
    assert set(choices_of(output, 3.5, True)) - set(choices_of(output, 4.5, True)) == {"gguf:Q2_K", "gguf:Q3_K"}
    assert set(RELATIVES) <= set(names("gguf"))


def test_the_loss_of_an_i_quant_is_predicted_from_few_rows() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 256, generator=draw) * torch.rand(512, 1, generator=draw)
    inputs = torch.randn(1024, 256, generator=draw) @ torch.randn(256, 256, generator=draw)
    hessian, settings = inputs.T @ inputs / 1024, replace(Recipe("model", "gguf:Q4_K").solver_settings, descent=0)
    losses = type_losses("a", weight, hessian, ("gguf:Q3_K", "gguf:IQ3_XXS", "gguf:IQ4_XS", "gguf:Q4_K"), settings)
    for codec, loss in losses.items():
        solved = solve_linear("a", weight, hessian, codec, settings).facts["loss"] / 2
        assert loss == pytest.approx(solved, rel=0.15)


def test_a_cache_serves_runs_that_choose_for_different_tensors(recipe: Recipe, tmp_path: Path) -> None:
    """The first run measures some linears of each block. The second run measures the rest too."""
    expected = quantize(recipe, tmp_path / "alone")["budget"]
    types = ["*.down_proj.weight=Q6_K"]
    first = Recipe(**{**vars(recipe), "types": types, "size": "5.5bpw"})
    quantize(first, tmp_path / "first", cache=str(tmp_path / "cache"))
    assert quantize(recipe, tmp_path / "second", cache=tmp_path / "cache")["budget"] == expected


def test_losses_that_another_run_adds_meanwhile_stay(tmp_path: Path) -> None:
    """Runs of two sizes measure other types of one tensor: each had overwritten what the other had measured."""
    one, other = MeasuredLosses(tmp_path), MeasuredLosses(tmp_path)
    one.add("embedding", {"gguf:Q4_K": 0.5, "gguf:Q6_K": 0.25})
    other.add("embedding", {"gguf:Q6_K": 0.25, "gguf:Q8_0": 0.125})
    assert one.losses() == {"embedding": {"gguf:Q4_K": 0.5, "gguf:Q6_K": 0.25, "gguf:Q8_0": 0.125}}


def test_a_stopped_search_goes_on(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = quantize(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("lqexport.pipeline.types_by_size.measure_outer", None)
        with pytest.raises(TypeError):
            quantize(recipe, tmp_path / "out")
    assert list((tmp_path / "out" / "work" / "moments").glob("*/types-*/*.json"))
    with monkeypatch.context() as patch:
        # All linears have been measured. Their moments are kept, and so are the weights of the tokens, which the
        # asymmetric calibration needs.
        patch.setattr("lqexport.pipeline.second_moments.guided_moments", None)
        patch.setattr("lqexport.pipeline.second_moments.guided_pass", None)
        assert quantize(recipe, tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"size": "1bpw"}, "Give a larger size"),
        ({"size": None}, "go together"),
        ({"target": "gguf:Q4_K"}, "go together"),
        ({"moments": "plain"}, "guided"),
        ({"without": "k"}, "without cannot be 'k'"),
        ({"target": "gguf:Q4_K", "size": None, "without": "iq"}, "choice by size"),
        ({"types": ["*.down_proj.weight"]}, "is like"),
        ({"types": ["*.nothing=Q4_K"]}, "has a name like"),
        ({"types": ["*.down_proj.weight=Q9_K"]}, "Unknown type"),
    ],
)
def test_bad_sizes_and_types_are_said(
    recipe: Recipe, options: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        quantize(Recipe(**{**vars(recipe), **options}), tmp_path / "out")


def test_the_command_shows_the_choice(recipe: Recipe, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["quantize", recipe.source, str(tmp_path / "out"), "--target", "gguf:auto", "--size", "4.5bpw",
                 "--calibration", recipe.calibration, "--samples", "2", "--sequence-length", "32",
                 "--tune", "0"]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "These types will be chosen anew, to fit 4.5bpw." in result.stdout
    assert "Predicted KL: " in result.stdout
    assert "predicted KL, nats per token" in (tmp_path / "out" / "budget.svg").read_text()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["bits_per_weight"] <= 4.5
