"""Second moments: guided ones compared with autograd through the whole model, asymmetric targets, and the cache."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lqexport.calibration.asymmetric import CrossMoments, Entering
from lqexport.calibration.guided import guided_moments, guided_pass
from lqexport.calibration.moments import SecondMoments, TokenWeights
from lqexport.converters.models.architecture import CUT
from lqexport.converters.models.value_heads import TILED
from lqexport.errors import UserError
from lqexport.models.blocks import BlockModel
from lqexport.models.source import Source, open_source
from lqexport.pipeline import prepare, second_moments
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.runtime.placement import all_on_device
from lqexport.runtime.progress import Silent
from lqexport.solver.cholesky import factorize
from lqexport.storage.artifact import Artifact

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 512, (5, 48), generator=torch.Generator().manual_seed(4))


def by_autograd(folder: Path, tokens: Tensor) -> dict[str, Tensor]:
    """Returns the guided Hessian of every linear, from transformers' model and one backward pass per sequence."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    captured: dict[str, tuple[Tensor, Tensor]] = {}
    linears = {name: module for name, module in model.named_modules() if name.endswith("_proj")}
    for name, module in linears.items():

        def keep(_: object, arguments: tuple[Tensor], output: Tensor, name: str = name) -> None:
            output.retain_grad()
            captured[name] = (arguments[0].detach()[0], output)

        module.register_forward_hook(keep)
    total = {name: torch.zeros(module.in_features, module.in_features) for name, module in linears.items()}
    for sequence in tokens:
        logits = model(sequence[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, sequence[1:], reduction="sum").backward()
        for name, (x, z) in captured.items():
            assert z.grad is not None
            total[name] += torch.einsum("t,ti,tj->ij", z.grad[0].square().mean(1), x, x)
    return {name: moments / tokens.numel() for name, moments in total.items()}


def test_guided_moments_are_those_of_autograd(tiny_model: Path, tokens: Tensor, tmp_path: Path) -> None:
    expected = by_autograd(tiny_model, tokens)
    model = BlockModel(open_source(str(tiny_model)))
    guided = {}
    for index, groups in guided_moments(model, tokens, output_groups=1, folder=tmp_path / "work", listener=Silent()):
        guided |= {f"model.layers.{index}.{linear}": hessian for (linear,), hessian in groups.items()}
    assert guided.keys() == expected.keys()
    for name, hessian in guided.items():
        torch.testing.assert_close(hessian, expected[name], rtol=1e-3, atol=1e-4 * float(expected[name].max()))
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize("groups", [1, 2])
def test_powers_of_the_weights_keep_the_trace(groups: int) -> None:
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(50, 12, generator=draw)
    gradient = torch.randn(50, 4, generator=draw) * torch.rand(50, 1, generator=draw) ** 3
    gradient[7] = torch.nan  # left out
    halves = [(x[:20], gradient[:20]), (x[20:], gradient[20:])]
    by_power = {}
    for power in (1.0, 0.5):
        moments = SecondMoments(12, "guided", CPU, groups, power=power)
        for half in halves:
            moments.add(*half)
            moments.end_shard()
        by_power[power] = moments.hessian().reshape(groups, 12, 12)
    weights = gradient.unflatten(1, (groups, -1)).square().mean(2)
    for group in range(groups):
        weight = weights[:, group].nan_to_num(0.0)
        expected = torch.einsum("t,ti,tj->ij", weight.sqrt(), x, x)
        expected *= torch.einsum("t,ti,ti->", weight, x, x) / expected.trace() / 49
        torch.testing.assert_close(by_power[0.5][group], expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(by_power[0.5], by_power[1.0], rtol=0.1)


def test_states_held_in_memory_give_the_same_moments(tiny_model: Path, tokens: Tensor, tmp_path: Path) -> None:
    """States that are held in memory leave no file, not even during the pass."""
    model = BlockModel(open_source(str(tiny_model)))
    expected = dict(guided_moments(model, tokens, output_groups=1, folder=tmp_path / "files", listener=Silent()))
    for index, groups in guided_moments(
        model, tokens, output_groups=1, folder=tmp_path / "held", listener=Silent(), held=True
    ):
        assert not (tmp_path / "held").exists()
        for group, hessian in groups.items():
            assert torch.equal(hessian, expected[index][group])


def test_one_pass_gives_moments_and_weights(tiny_model: Path, tokens: Tensor, tmp_path: Path) -> None:
    """A pass that collects moments and token weights gives what separate passes give."""
    model, weights = BlockModel(open_source(str(tiny_model))), []
    alone = dict(guided_moments(model, tokens, output_groups=1, folder=tmp_path / "alone", listener=Silent()))
    both = guided_moments(
        model, tokens, output_groups=1, folder=tmp_path / "both", listener=Silent(), power=0.5, weights=weights.append
    )
    moments = guided_moments(model, tokens, output_groups=1, folder=tmp_path / "moments", listener=Silent(), power=0.5)
    for (index, groups), (_, expected) in zip(both, moments, strict=True):
        assert weights[-1][0] == index
        for group, hessian in groups.items():
            assert torch.equal(hessian, expected[group])
            assert not torch.equal(hessian, alone[index][group])
    sums = [partial(TokenWeights, power=0.5)]
    passed = [block for (block,) in guided_pass(model, tokens, sums, folder=tmp_path / "weights", listener=Silent())]
    for (_, groups), (_, expected) in zip(weights, passed, strict=True):
        assert all(
            torch.equal(weight, expected[group]) and len(weight) == tokens.numel() for group, weight in groups.items()
        )


def test_output_groups_average_to_one(tiny_model: Path, tokens: Tensor, tmp_path: Path) -> None:
    model = BlockModel(open_source(str(tiny_model)))
    one, four = (
        dict(guided_moments(model, tokens, output_groups=n, folder=tmp_path / str(n), listener=Silent()))
        for n in (1, 4)
    )
    for index, groups in one.items():
        for group, hessian in groups.items():
            several = four[index][group]
            assert several.shape == (4, *hessian.shape)
            torch.testing.assert_close(several.mean(0), hessian, rtol=1e-3, atol=1e-5 * float(hessian.max()))
            assert not torch.allclose(several[0], several[1], rtol=0.01)


@pytest.mark.parametrize("columns", [5, 8, 100])
def test_panels_make_a_whole_matrix(columns: int) -> None:
    x = torch.randn(30, columns)
    moments = SecondMoments(columns, "plain", CPU)
    for batch in x.split(11):
        moments.add(batch)
    torch.testing.assert_close(moments.hessian(), x.T @ x / 30)
    assert torch.equal(moments.hessian(), moments.hessian().T)


def test_passes_in_bfloat16_give_nearly_the_same(tiny_model: Path, tokens: Tensor, tmp_path: Path) -> None:
    source = open_source(str(tiny_model))
    exact, near = (
        dict(
            guided_moments(
                BlockModel(source, compute_dtype=dtype),
                tokens,
                output_groups=1,
                folder=tmp_path / str(dtype),
                listener=Silent(),
            )
        )
        for dtype in (torch.float32, torch.bfloat16)
    )
    for index, groups in exact.items():
        for group, hessian in groups.items():
            difference = (near[index][group] - hessian).norm() / hessian.norm()
            assert 1e-5 < difference < 0.1  # the products were rounded, but no more coarsely than to bfloat16


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Recipe:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog, " * 400)
    return Recipe(str(tiny_model), "gguf:Q2_K", calibration=str(tmp_path / "text.txt"), samples=4, sequence_length=32,
                  moments="guided", prefix="full", tune=0)  # fmt: skip


def test_a_cache_is_shared_by_targets(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(recipe, tmp_path / "alone")
    quantize(recipe, tmp_path / "first", cache=tmp_path / "cache")
    monkeypatch.setattr(second_moments, "guided_moments", None)  # nothing is collected again
    quantize(recipe, tmp_path / "second", cache=tmp_path / "cache")
    other_recipe = Recipe(**{**vars(recipe), "target": "native:table-3"})
    quantize(other_recipe, tmp_path / "other", cache=tmp_path / "cache")
    assert Artifact(tmp_path / "alone").manifest() == Artifact(tmp_path / "first").manifest()
    assert Artifact(tmp_path / "alone").manifest() == Artifact(tmp_path / "second").manifest()
    with pytest.raises(TypeError):
        quantize(Recipe(**{**vars(recipe), "samples": 3}), tmp_path / "third", cache=tmp_path / "cache")


@pytest.mark.parametrize("key", [TILED, CUT])
def test_a_cache_is_not_shared_by_sources_with_other_columns_or_linears(
    recipe: Recipe, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GGUF files have the columns of some linears in another order, or two linears in the place of one."""
    quantize(recipe, tmp_path / "first", cache=tmp_path / "cache")
    opened = prepare.source_of

    def rearranged(recipe: Recipe) -> Source:
        source = opened(recipe)
        source.config[key] = True
        return source

    monkeypatch.setattr(prepare, "source_of", rearranged)
    monkeypatch.setattr(second_moments, "guided_moments", None)
    with pytest.raises(TypeError):  # they are collected again
        quantize(recipe, tmp_path / "second", cache=tmp_path / "cache")


def test_a_cache_is_not_shared_by_tokenizers(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer may be corrected beside the same weights; the text is the same, but its tokens are others."""
    folder = shutil.copytree(recipe.source, tmp_path / "model")
    recipe = replace(recipe, source=str(folder), target="native:table-3")
    quantize(recipe, tmp_path / "first", cache=tmp_path / "cache")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "fox"}, "content": "cat"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr(second_moments, "guided_moments", None)
    with pytest.raises(TypeError):  # they are collected again
        quantize(recipe, tmp_path / "second", cache=tmp_path / "cache")


def test_a_damaged_cache_is_said(recipe: Recipe, tmp_path: Path) -> None:
    quantize(recipe, tmp_path / "first", cache=tmp_path / "cache")
    path = next((tmp_path / "cache").glob("*/block-1.safetensors"))
    content = path.read_bytes()
    for damaged, sentence in (
        (content[:100], r"block-1\.safetensors is cut short or damaged"),
        (content[:-1] + bytes([content[-1] ^ 1]), r"block-1\.safetensors is not as it was written"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=sentence):
            quantize(recipe, tmp_path / "second", cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"moments": "guided", "prefix": "quantized", "asymmetric": False}, "full-precision model"),
        ({"moments": "plain", "output_groups": 2}, "Only guided"),
        ({"output_groups": 2, "prefix": "quantized", "asymmetric": True}, "one output group"),
        ({"asymmetric": True, "prefix": "full"}, "needs prefix 'quantized'"),
        ({"moments": "guided", "output_groups": 3}, "do not divide"),
        ({"guided_power": 0.0}, "above 0"),
    ],
)
def test_options_that_do_not_go_together(
    recipe: Recipe, options: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        quantize(Recipe(**{**vars(recipe), "prefix": None, "moments": "plain", **options}), tmp_path / "out")


def drifted(tokens: int, noise: float) -> tuple[Tensor, Tensor]:
    """Returns full-precision inputs, and inputs behind a prefix that shrinks and mixes them and adds noise."""
    draw = torch.Generator().manual_seed(tokens)
    full = torch.randn(tokens, 16, generator=draw) @ torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    mixed = 0.8 * full + 0.1 * full.roll(1, 1)
    return full, mixed + noise * torch.randn(tokens, 16, generator=draw)


def cross_moments(tokens: int, noise: float) -> CrossMoments:
    moments = CrossMoments(16, "plain", all_on_device(CPU))
    for half in (0, 1):
        moments.add(half, *(Entering(inputs.chunk(2)[half]) for inputs in drifted(tokens, noise)))
    return moments


def target_of(moments: CrossMoments, weight: Tensor, dampening: float) -> tuple[Tensor, float]:
    return moments.target(weight, factorize(moments.hessian(), dampening, act_order=True))


def test_products_and_sums_are_float32_whatever_passes_multiply_in() -> None:
    inputs = torch.randn(500, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    moments = SecondMoments(24, "plain", CPU)
    with torch.autocast("cpu", torch.bfloat16):
        assert (inputs @ inputs.T).dtype == torch.bfloat16
        moments.add(inputs)
    exact = inputs.double().T @ inputs.double() / len(inputs)
    torch.testing.assert_close(moments.hessian().double(), exact, rtol=1e-6, atol=1e-6)


def test_an_asymmetric_target_keeps_the_outputs() -> None:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    target, strength = target_of(cross_moments(4000, 0.1), weight, 1e-4)
    full, quantized = drifted(1000, 0.1)
    before = (full @ weight.T - quantized @ weight.T).square().sum()
    assert (full @ weight.T - quantized @ target.T).square().sum() < 0.1 * before
    assert 0.9 < strength <= 1


def test_an_asymmetric_target_does_not_fit_noise() -> None:
    """A correction of 16 columns from 40 tokens is mostly noise. What held-out tokens do not confirm is left out."""
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    moments = CrossMoments(16, "plain", all_on_device(CPU))
    draw = torch.Generator().manual_seed(2)
    for half in (0, 1):
        full = torch.randn(20, 16, generator=draw)
        moments.add(half, Entering(full), Entering(full + torch.randn(20, 16, generator=draw) * 0.05))
    target, strength = target_of(moments, weight, 1e-4)
    assert strength < 0.5
    same, none = CrossMoments(16, "plain", all_on_device(CPU)), torch.randn(20, 16, generator=draw)
    same.add(0, Entering(none), Entering(none))
    assert torch.equal(target_of(same, weight, 0.05)[0], weight)
    assert (target - weight).norm() < 0.1 * weight.norm()


@pytest.mark.parametrize("moments_type", ["normalized", "guided"])
def test_what_hidden_states_lack_is_made_up_for(moments_type: str) -> None:
    """A part of the hidden states' error depends on the inputs of a linear whose output is added to them.

    With normalized moments, two tokens with hidden states a thousand times as large do not dominate the target.
    """
    draw = torch.Generator().manual_seed(5)
    weight, moments = torch.randn(8, 16, generator=draw), CrossMoments(16, moments_type, all_on_device(CPU), rows=8)
    lost = torch.randn(8, 16, generator=draw)
    before = after = 0.0
    for half in (0, 1, 2):
        full, quantized = drifted(1000 + half, 0.1)
        stream = torch.randn(len(full), 8, generator=draw) * 10
        lacking = quantized @ lost.T + 3 * torch.randn(len(full), 8, generator=draw)
        size = torch.ones(len(full), 1)
        if moments_type == "normalized":
            size[:2] = 1000
        if half < 2:
            weights = torch.ones(len(full)) if moments_type == "guided" else None
            moments.add(half, Entering(full, (stream + lacking) * size), Entering(quantized, stream * size), weights)
            continue
        target, strength = target_of(moments, weight, 1e-4)
        before = float((full @ weight.T + lacking - quantized @ weight.T).square().sum())
        after = float((full @ weight.T + lacking - quantized @ target.T).square().sum())
    assert 0.8 < strength <= 1
    assert after < 0.2 * before


def test_cross_moments_hold_the_plain_hessian() -> None:
    full, quantized = drifted(100, 0.1)
    for moments_type in ("plain", "normalized"):
        both, alone = CrossMoments(16, moments_type, all_on_device(CPU)), SecondMoments(16, moments_type, CPU)
        both.add(0, Entering(full[:60]), Entering(quantized[:60]))
        both.add(1, Entering(full[60:]), Entering(quantized[60:]))
        alone.add(quantized)
        torch.testing.assert_close(both.hessian(), alone.hessian())


def test_cross_moments_of_four_shards_are_those_of_one() -> None:
    """Shards take turns in the same memory, so what one of them left must not stay in the next."""
    one, four = (CrossMoments(16, "normalized", all_on_device(CPU), rows=4) for _ in range(2))
    draw = torch.Generator().manual_seed(4)
    for full, quantized in zip(*(inputs.split(30) for inputs in drifted(120, 0.1)), strict=True):
        streams = torch.randn(2, 30, 4, generator=draw)
        for half in (0, 1):
            entering = Entering(full[half::2], streams[0, half::2]), Entering(quantized[half::2], streams[1, half::2])
            one.add(half, *entering)
            four.add(half, *entering)
        four.end_shard()
    weight = torch.randn(4, 16, generator=draw)
    torch.testing.assert_close(four.hessian(), one.hessian())
    for of_four, of_one in zip(target_of(four, weight, 0.1), target_of(one, weight, 0.1), strict=True):
        torch.testing.assert_close(of_four, of_one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_cross_moments_with_token_weights_are_guided(power: float) -> None:
    """If nothing is quantized yet, cross moments with token weights are the guided Hessian, up to a factor."""
    draw = torch.Generator().manual_seed(3)
    inputs, gradient = torch.randn(40, 16, generator=draw), torch.randn(40, 6, generator=draw) ** 3
    alone, weights = SecondMoments(16, "guided", CPU, power=power), TokenWeights(16, power)
    both = CrossMoments(16, "guided", all_on_device(CPU))
    for tokens in (slice(0, 25), slice(25, 40)):
        alone.add(inputs[tokens], gradient[tokens])
        weights.add(inputs[tokens], gradient[tokens])
    for half, tokens in enumerate((slice(0, 25), slice(25, 40))):
        both.add(half, Entering(inputs[tokens]), Entering(inputs[tokens]), weights.hessian()[tokens])
    expected, weighted = alone.hessian(), both.hessian()
    assert 0.5 < float(weighted.trace() / expected.trace()) < 2
    torch.testing.assert_close(weighted / weighted.trace(), expected / expected.trace(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("moments_type", ["plain", "normalized", "guided"])
def test_tokens_that_are_not_finite_are_left_out(moments_type: str) -> None:
    draw = torch.Generator().manual_seed(2)
    inputs, gradient = torch.randn(12, 8, generator=draw), torch.randn(12, 6, generator=draw)
    broken, good = SecondMoments(8, moments_type, CPU, 2 if moments_type == "guided" else 1), slice(4, 12)
    finite = SecondMoments(8, moments_type, CPU, 2 if moments_type == "guided" else 1)
    finite.add(inputs[good], gradient[good])
    inputs[0, 3], inputs[1, 2], inputs[2, 1] = torch.nan, torch.inf, 1e30  # the last one's square overflows
    gradient[3, 4] = torch.nan
    if moments_type != "guided":
        inputs[3, 0] = -torch.inf
    broken.add(inputs, gradient)
    torch.testing.assert_close(broken.hessian(), finite.hessian())
    nothing = SecondMoments(8, moments_type, CPU)
    nothing.add(torch.full((4, 8), torch.nan), gradient[:4])
    assert torch.equal(nothing.hessian(), torch.eye(8))
