"""Second moments of experts: what is added to those of their own tokens, and resumed runs that get the same."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lqexport.calibration import collect
from lqexport.calibration.block_collector import BlockCollector, BlockMoments
from lqexport.calibration.experts import FILL, fill_up, parts, pooled
from lqexport.calibration.moments import SecondMoments
from lqexport.converters.models.families.mixtral import MIXTRAL
from lqexport.converters.models.tensor_names import expert_number
from lqexport.models.blocks import BlockModel
from lqexport.models.source import open_source
from lqexport.pipeline.quantize import quantize
from lqexport.planning import memory
from lqexport.recipe import Recipe

CPU, COLUMNS = torch.device("cpu"), 12
TWO = MIXTRAL.expanded(2)


def moments_of(*batches: Tensor) -> SecondMoments:
    moments = SecondMoments(COLUMNS, "plain", CPU)
    for inputs in batches:
        moments.add(inputs)
    return moments


def draw(tokens: int, seed: int) -> Tensor:
    return torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(seed))


def test_hidden_states_are_filled_up_with_those_of_all_experts() -> None:
    inputs = [draw(5, 0), draw(40, 1)]
    filled = {(f"mlp.experts.{i}.gate_proj", f"mlp.experts.{i}.up_proj"): moments_of(x) for i, x in enumerate(inputs)}
    fill_up(filled, {"mlp.experts.*.gate_proj": moments_of(*inputs)}, TWO)
    everything, more = torch.cat(inputs), FILL * COLUMNS
    average = everything.T @ everything / len(everything)
    for x, moments in zip(inputs, filled.values(), strict=True):
        assert torch.allclose(moments.hessian(), (x.T @ x + more * average) / (len(x) + more), atol=1e-5)


def test_inputs_of_its_own_are_filled_up_uncorrelated() -> None:
    inputs = [draw(5, 0), draw(40, 1)]
    filled = {(f"mlp.experts.{i}.down_proj",): moments_of(x) for i, x in enumerate(inputs)}
    fill_up(filled, {}, TWO)
    for x, moments in zip(inputs, filled.values(), strict=True):
        plain, more = x.T @ x / len(x), FILL * COLUMNS
        expected = (len(x) * plain + more * plain.diagonal().diag()) / (len(x) + more)
        assert torch.allclose(moments.hessian(), expected, atol=1e-5)
        assert torch.allclose(moments.hessian().diagonal(), plain.diagonal(), atol=1e-5)


def test_an_expert_without_tokens_takes_the_average() -> None:
    inputs = draw(40, 1)
    filled = {("mlp.experts.0.gate_proj",): moments_of(), ("mlp.experts.0.down_proj",): moments_of()}
    fill_up(filled, {"mlp.experts.*.gate_proj": moments_of(inputs)}, TWO)
    hidden, inner = (moments.hessian() for moments in filled.values())
    assert torch.allclose(hidden, inputs.T @ inputs / len(inputs), atol=1e-5)
    assert torch.equal(inner, torch.eye(COLUMNS))  # no token has reached this expert


def test_guided_moments_keep_their_trace() -> None:
    """Guided moments estimate nats over all tokens. Their trace does not depend on the power of the tokens' weights."""
    inputs, gradients = [draw(8, 0), draw(40, 1)], [draw(8, 2), draw(40, 3)]
    traces = []
    for power in (0.5, 1.0):
        *experts, pool = (SecondMoments(COLUMNS, "guided", CPU, power=power) for _ in range(3))
        for expert, *tokens in zip(experts, inputs, gradients, strict=True):
            expert.add(*tokens)
            pool.add(*tokens)
        filled = {(f"mlp.experts.{i}.gate_proj",): expert for i, expert in enumerate(experts)}
        fill_up(filled, {"mlp.experts.*.gate_proj": pool}, TWO)
        traces.append([float(moments.hessian().trace()) for moments in filled.values()])
    assert traces[0] == pytest.approx(traces[1], rel=1e-4)


def test_other_linears_are_left_alone() -> None:
    x = draw(5, 0)
    filled = {("self_attn.o_proj",): moments_of(x)}
    fill_up(filled, {}, TWO)
    assert torch.equal(filled[("self_attn.o_proj",)].hessian(), moments_of(x).hessian())


def test_what_all_experts_see_is_of_all_of_them() -> None:
    """The average covers all experts even if only one is left to solve."""
    groups = TWO.linears_of(0)
    attention, down = groups[0], ("mlp.experts.1.down_proj",)
    other = ("mlp.experts.1.gate_proj", "mlp.experts.1.up_proj")
    assert set(groups) >= {attention, other, down}
    every = ["mlp.experts.0.gate_proj", "mlp.experts.1.gate_proj"]
    assert pooled([attention, other], groups, TWO) == {"mlp.experts.*.gate_proj": every}
    assert pooled([attention, down], groups, TWO) == {}


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_parts_are_whole_experts(count: int) -> None:
    groups = MIXTRAL.expanded(5).linears_of(0)
    divided = parts(groups, count)
    assert len(divided) == min(count, 5)
    assert [group for part in divided for group in part if "experts" not in group[0]] == [
        groups[0],
        ("self_attn.o_proj",),
    ]
    experts = [{expert_number(group[0]) for group in part} - {None} for part in divided]
    assert [number for part in experts for number in sorted(part)] == list(range(5))
    assert max(map(len, experts)) == -(-5 // len(divided))


@pytest.fixture
def recipe(text: Path, experts_model: Path) -> Recipe:
    options = {"samples": 4, "sequence_length": 32, "descent": 1, "tune": 0}
    return Recipe(str(experts_model), "gguf:Q4_0", calibration=str(text), **options)


def in_parts(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Makes runs divide the experts into `count` parts, as little memory would."""
    chosen = memory.choose_placement
    monkeypatch.setattr(
        "lqexport.pipeline.prepare.choose_placement", lambda *arguments: replace(chosen(*arguments), parts=count)
    )


@pytest.mark.parametrize("moments", ["normalized", "guided"])
def test_some_experts_at_a_time_are_solved_as_all_at_once(
    moments: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(recipe, moments=moments)
    monkeypatch.setattr(collect, "BATCH_TOKENS", 64)  # two shards
    quantize(recipe, tmp_path / "1")
    at_once: list[int] = []
    collect_block = BlockCollector.moments

    def counted(self: BlockCollector) -> BlockMoments:
        block = collect_block(self)
        at_once.append(len(block[1]))
        return block

    monkeypatch.setattr(BlockCollector, "moments", counted)
    for count in (2, 3):
        in_parts(monkeypatch, count)
        quantize(recipe, tmp_path / str(count))
        assert digests(tmp_path / str(count)) == digests(tmp_path / "1")
    # The numbers of Hessians of attention and the gated MLP, and of an expert. Guided: one for each linear; otherwise
    # one for the linears that share their inputs.
    dense, expert = {"guided": (5 + 3, 3), "normalized": (4 + 2, 2)}[moments]
    of_two, of_three = [dense + 3 * expert, 2 * expert], [dense + 2 * expert, 2 * expert, expert]
    expected = [dense, *of_two * 2, dense, *of_three * 2]
    assert at_once == ([*of_two * 2, dense, *of_three * 2, dense] if moments == "guided" else expected)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("moments", ["normalized", "guided"])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    moments: str, count: int, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is stopped between two experts of a block, so that only the second is left to solve."""
    recipe = replace(recipe, moments=moments)
    quantize(recipe, tmp_path / "whole")
    in_parts(monkeypatch, count)
    place = Path.replace

    def until(self: Path, target: Path) -> Path:
        if "experts.2.up_proj" in str(target):
            raise KeyboardInterrupt
        return place(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", until)
        with pytest.raises(KeyboardInterrupt):
            quantize(recipe, tmp_path / "stopped")
    quantize(recipe, tmp_path / "stopped")
    assert digests(tmp_path / "stopped") == digests(tmp_path / "whole")


def test_of_a_block_only_some_experts_are_read_and_run(experts_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BlockModel(open_source(str(experts_model)))
    hidden, read = model.start(torch.arange(48)[None]), model.weights.read
    names: list[str] = []

    def noted(name: str) -> Tensor:
        names.append(name)
        return read(name)

    monkeypatch.setattr(model.weights, "read", noted)
    some = model.block(1, experts=[1, 3])
    assert {expert_number(name) for name in names} == {None, 1, 3}
    assert len(names) == len(some.state_dict()) - 3 * 3
    seen: list[Tensor] = []
    for block in (some, model.block(1)):
        last = block.get_submodule("mlp.experts.3.down_proj")
        last.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        model.run(block, hidden)
    assert torch.equal(*seen)


def digests(folder: Path) -> dict[str, str]:
    files = sorted((folder / "tensors").rglob("*.safetensors"))
    assert files
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
