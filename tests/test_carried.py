"""Models whose blocks need more than hidden states: inputs of their own, and keys and values of earlier blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from family_cases import CASES, make_model, make_tokenizer
from family_cases import pieces as pieces
from family_cases import texts as texts
from transformers import PreTrainedModel

from lqexport.converters.models.architectures import architecture_of
from lqexport.converters.targets import plan
from lqexport.models.blocks import BlockModel
from lqexport.models.source import open_source
from lqexport.pipeline.quantize import quantize
from lqexport.planning.cost import Work
from lqexport.recipe import Recipe
from lqexport.target import Target

NAME = "gemma4-e"
TOKENS = torch.randint(3, 480, (2, 2, 40), generator=torch.Generator().manual_seed(0))
"""Two batches of the same shape."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, pieces: Path) -> tuple[PreTrainedModel, Path]:
    return saved(NAME, tmp_path_factory.mktemp("carried"), pieces)


@pytest.fixture(scope="module", params=[NAME, "gemma3n"])
def either(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pieces: Path
) -> tuple[PreTrainedModel, Path]:
    """A model whose blocks share keys, or one with several hidden states for each token."""
    return saved(request.param, tmp_path_factory.mktemp("either"), pieces)


def saved(name: str, folder: Path, pieces: Path) -> tuple[PreTrainedModel, Path]:
    model = make_model(name)
    model.save_pretrained(folder)
    make_tokenizer(CASES[name][2], pieces).save_pretrained(folder)
    return model, folder


def test_batches_of_one_shape_keep_their_own_inputs_and_keys(either: tuple[PreTrainedModel, Path]) -> None:
    """All batches pass through a block before the next one."""
    whole, folder = either
    model = BlockModel(open_source(str(folder)))
    states = [model.start(batch) for batch in TOKENS]
    assert all(state.shape[-1] > whole.config.hidden_size for state in states)
    for _, block in model.blocks():
        states = [model.run(block, state) for state in states]
    for batch, state in zip(TOKENS, states, strict=True):
        with torch.no_grad():
            assert torch.allclose(model.logits(state), whole(batch, use_cache=False).logits, atol=1e-4)


def test_gradients_pass_through_all_that_later_blocks_use(either: tuple[PreTrainedModel, Path]) -> None:
    """A backward pass block by block gives the gradient of the whole model."""
    model = BlockModel(open_source(str(either[1])))
    inputs, blocks = [model.start(TOKENS[0])], [model.block(index) for index in range(len(model))]
    for block in blocks:
        inputs.append(model.run(block, inputs[-1]))
    gradient = torch.ones_like(inputs[-1])
    for block, states in zip(reversed(blocks), reversed(inputs[:-1]), strict=True):
        states = states.detach().requires_grad_()
        gradient = torch.autograd.grad(model.run(block, states), states, gradient)[0]
    embedded = model.start(TOKENS[0]).requires_grad_()
    states = embedded
    for block in blocks:
        states = model.run(block, states)
    assert torch.allclose(gradient, torch.autograd.grad(states.sum(), embedded)[0], rtol=1e-3, atol=1e-3)


def test_guided_moments_and_tuning(
    either: tuple[PreTrainedModel, Path], tmp_path: Path, texts: tuple[str, str]
) -> None:
    recipe = Recipe(str(either[1]), "gguf:Q4_0", calibration=texts[0], samples=4, sequence_length=32, descent=0, tune=2,
                    moments="guided")  # fmt: skip
    report = quantize(recipe, tmp_path / "out")
    assert all(tensor["relative_error"] < 0.1 for tensor in report["tensors"] if "relative_error" in tensor)


def test_keys_of_blocks_that_use_those_of_others_are_left_out(
    source: tuple[PreTrainedModel, Path], tmp_path: Path
) -> None:
    """Published checkpoints hold them, and so do files of llama.cpp's converter."""
    config = open_source(str(source[1])).config
    architecture = architecture_of(config)
    assert architecture.first_borrower == 2
    shapes = {name: tuple(tensor.shape) for name, tensor in source[0].state_dict().items()}
    shapes.pop("lm_head.weight")
    spare = {f"model.layers.3.self_attn.{name}.weight": (64, 64) for name in ("k_proj", "v_proj", "k_norm")}
    target = Target.parse("gguf:Q4_0")
    assert plan(target, config, shapes | spare) == plan(target, config, shapes)


def test_estimates_count_the_tables_and_the_states(source: tuple[PreTrainedModel, Path]) -> None:
    config = open_source(str(source[1])).config
    shapes = {name: tuple(tensor.shape) for name, tensor in source[0].state_dict().items() if name != "lm_head.weight"}
    work = Work(Recipe("model", "gguf:Q4_0"), config, plan(Target.parse("gguf:Q4_0"), config, shapes))
    assert work.states == 64 + 4 * 32 + 2 * (2 * 16 + 2 * 32)
    assert work.tables == 512 * 4 * 32
