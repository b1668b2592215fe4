"""Second moments of experts: what they get beside those of their own tokens; a run that goes on gets the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from lqexport.converters.architectures import MIXTRAL
from lqexport.experts import FILL, fill_up, with_all_experts
from lqexport.moments import SecondMoments
from lqexport.pipeline import quantize
from lqexport.recipe import Recipe

CPU, COLUMNS = torch.device("cpu"), 12
TWO = MIXTRAL.expanded(2)


def moments_of(inputs: Tensor, gradient: Tensor | None = None, power: float = 1.0) -> SecondMoments:
    found = SecondMoments(COLUMNS, "plain" if gradient is None else "guided", CPU, power=power)
    if len(inputs):
        found.add(inputs, gradient)
    return found


def draw(tokens: int, seed: int) -> Tensor:
    return torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(seed))


def test_hidden_states_are_filled_up_with_those_of_all_experts() -> None:
    inputs = [draw(5, 0), draw(40, 1)]
    found = {(f"mlp.experts.{i}.gate_proj", f"mlp.experts.{i}.up_proj"): moments_of(x) for i, x in enumerate(inputs)}
    fill_up(found, TWO)
    everything, more = torch.cat(inputs), FILL * COLUMNS
    average = everything.T @ everything / len(everything)
    for x, each in zip(inputs, found.values(), strict=True):
        assert torch.allclose(each.hessian(), (x.T @ x + more * average) / (len(x) + more), atol=1e-5)


def test_inputs_of_its_own_are_filled_up_uncorrelated() -> None:
    inputs = [draw(5, 0), draw(40, 1)]
    found = {(f"mlp.experts.{i}.down_proj",): moments_of(x) for i, x in enumerate(inputs)}
    fill_up(found, TWO)
    for x, each in zip(inputs, found.values(), strict=True):
        own, more = x.T @ x / len(x), FILL * COLUMNS
        expected = (len(x) * own + more * own.diagonal().diag()) / (len(x) + more)
        assert torch.allclose(each.hessian(), expected, atol=1e-5)
        assert torch.allclose(each.hessian().diagonal(), own.diagonal(), atol=1e-5)


def test_an_expert_without_tokens_takes_the_average() -> None:
    inputs = draw(40, 1)
    names = [("mlp.experts.0.gate_proj",), ("mlp.experts.1.gate_proj",), ("mlp.experts.0.down_proj",)]
    found = dict(zip(names, (moments_of(draw(0, 0)), moments_of(inputs), moments_of(draw(0, 0))), strict=True))
    fill_up(found, TWO)
    without, _, own = (each.hessian() for each in found.values())
    assert torch.allclose(without, inputs.T @ inputs / len(inputs), atol=1e-5)
    assert torch.equal(own, torch.eye(COLUMNS))  # nothing is known of it


def test_guided_moments_keep_their_trace() -> None:
    """What they estimate are nats of all tokens, whatever the power of the tokens' weights."""
    inputs, gradients = [draw(8, 0), draw(40, 1)], [draw(8, 2), draw(40, 3)]
    names = [("mlp.experts.0.gate_proj",), ("mlp.experts.1.gate_proj",)]
    traces = []
    for power in (0.5, 1.0):
        pairs = zip(names, inputs, gradients, strict=True)
        found = {name: moments_of(x, gradient, power) for name, x, gradient in pairs}
        fill_up(found, TWO)
        traces.append([float(each.hessian().trace()) for each in found.values()])
    assert traces[0] == pytest.approx(traces[1], rel=1e-4)


def test_other_linears_are_left_alone() -> None:
    x = draw(5, 0)
    found = {("self_attn.o_proj",): moments_of(x)}
    fill_up(found, TWO)
    assert torch.equal(found[("self_attn.o_proj",)].hessian(), moments_of(x).hessian())


def test_moments_of_an_expert_need_all_that_see_what_it_sees() -> None:
    attention, *_ = groups = TWO.linears_of(0)
    (gate, other), (down, _) = ([group for group in groups if name in group[0]] for name in ("gate_proj", "down_proj"))
    assert with_all_experts([attention, other], groups, TWO) == [attention, gate, other]
    assert with_all_experts([down], groups, TWO) == [down]


@pytest.mark.parametrize("moments", ["normalized", "guided"])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    moments: str, text: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between two experts of a block, of which the second alone is then still to be solved."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes["num_key_value_heads"] = 2
    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=512, num_local_experts=4, bos_token_id=None, eos_token_id=None, **sizes)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((tiny_model / name).read_bytes())
    recipe = Recipe(str(tmp_path / "model"), "gguf:Q4_0", calibration=str(text), samples=4, sequence_length=32,
                    moments=moments, descent=1, tune=0)  # type: ignore[arg-type]  # fmt: skip
    quantize(recipe, tmp_path / "whole")
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


def digests(folder: Path) -> dict[str, str]:
    files = sorted((folder / "tensors").rglob("*.safetensors"))
    assert files
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
