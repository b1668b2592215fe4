"""Every architecture of the table: a small random model with its family's tokenizer.

The outputs of unmodified llama.cpp are compared with those of transformers.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from family_cases import CASES, STRINGS, UNSMOOTHED, architecture_of_case, export, make_model, make_tokenizer
from family_cases import pieces as pieces
from family_cases import texts as texts
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lqexport.calibration.paused import PausedBlock, execution_order
from lqexport.checking.checking import check_file
from lqexport.converters.models.architectures import ARCHITECTURES, architecture_of
from lqexport.evaluation.llamacpp import LlamaCpp
from lqexport.models.blocks import BlockModel, linear_of
from lqexport.models.smoothing import Smoothed, pairs
from lqexport.models.source import open_source
from lqexport.recipe import Recipe
from lqexport.verification.verifying import verify


@dataclass
class Case:
    """The model of a case, its folder, its tokenizer and its GGUF file in F16."""

    name: str
    model: PreTrainedModel
    folder: Path
    tokenizer: PreTrainedTokenizerFast
    f16: Path

    @property
    def source(self) -> str:
        return str(self.folder / "hf")


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pieces: Path, llamacpp_here: None
) -> Iterator[Case]:
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    model, tokenizer = make_model(name), make_tokenizer(CASES[name][2], pieces)
    model.save_pretrained(folder / "hf")
    tokenizer.save_pretrained(folder / "hf")
    yield Case(name, model, folder, tokenizer, export(folder, Recipe(str(folder / "hf"), "gguf:F16")))
    shutil.rmtree(folder)


TOKENS = [1, *(int(token) for token in np.random.default_rng(0).integers(3, 480, 60))]


@torch.no_grad()
def expected_logits(model: PreTrainedModel, tokens: list[int]) -> np.ndarray:
    return model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()


def continued(engine: LlamaCpp, tokens: list[int], more: int) -> list[int]:
    """Returns `tokens` and `more` tokens after them, always the most probable one."""
    for _ in range(more):
        tokens = [*tokens, int(engine.logits(tokens, len(tokens) - 1)[-1].argmax())]
    return tokens


@pytest.mark.llamacpp
def test_logits_and_continuations_are_those_of_transformers(case: Case) -> None:
    expected = expected_logits(case.model, TOKENS)
    assert 0.5 < expected.std() < 2
    with LlamaCpp(case.f16, 80, threads=1) as engine:
        logits = engine.logits(TOKENS)
        continuation = continued(engine, TOKENS, 6)
    assert np.abs(logits - expected).mean() < 0.003
    # One pass checks every step, since position t of the output depends on the tokens up to t.
    chosen = expected_logits(case.model, continuation).argmax(1)[len(TOKENS) - 1 : -1]
    assert continuation[len(TOKENS) :] == chosen.tolist()


@pytest.mark.llamacpp
def test_tokens_are_those_of_transformers(case: Case) -> None:
    with LlamaCpp(case.f16, 32, threads=1) as engine:
        for text in STRINGS:
            assert engine.tokenize(text) == case.tokenizer(text, add_special_tokens=False).input_ids, text


def test_file_comes_back_as_the_model(case: Case) -> None:
    """Our own reader of GGUF files gives a model with the same logits: names, config and row orders are right."""
    source = open_source(str(case.f16))
    assert set(source.names()) == set(open_source(case.source).names()) - {tied_output(case)}
    model = BlockModel(source)
    states = model.start(torch.tensor([TOKENS]))
    for _, block in model.blocks():
        states = model.run(block, states)
    assert np.abs(model.logits(states)[0].numpy() - expected_logits(case.model, TOKENS)).mean() < 0.003


def test_check_has_nothing_to_say_of_a_right_file(case: Case) -> None:
    """llama.cpp loads the same file in the tests above."""
    assert check_file(case.f16, engine=False).problems == []


def tied_output(case: Case) -> str | None:
    return (
        architecture_of(case.model.config.to_dict()).output
        if open_source(case.source).config["tie_word_embeddings"]
        else None
    )


@pytest.mark.llamacpp
def test_q8_0(case: Case) -> None:
    """llama.cpp rounds activations to 8 bits, so its logits are only near, and a few tokens go to other experts."""
    path = export(case.folder, Recipe(case.source, "gguf:Q8_0", method="rtn"))
    with LlamaCpp(path, 64, threads=1) as engine:
        logits = engine.logits(TOKENS)
    experts = architecture_of(case.model.config.to_dict()).experts
    least = 0.95 if case.name.startswith("deepseek") else 0.97 if experts else 0.997 if case.name == "mamba" else 0.998
    correlation = np.corrcoef(logits.ravel(), expected_logits(case.model, TOKENS).ravel())[0, 1]
    assert correlation > least


@pytest.mark.llamacpp
def test_quantized_and_verified(case: Case, texts: tuple[str, str]) -> None:
    """The narrow models cannot hold Q4_K. Its fallback Q5_0 is solved, exported, and verified by both engines."""
    recipe = Recipe(case.source, "gguf:Q4_K", calibration=texts[0], samples=4, sequence_length=64, tune=0, descent=1)
    path = export(case.folder, recipe)
    for engine in ("lqexport", "llama.cpp"):
        result = verify(
            path, case.source, text=texts[1], windows=1, engine=engine, artifact=case.folder / "artifact-Q4_K"
        )
        assert result.warnings == result.failed == []
        assert all(tensor.same_bytes for tensor in result.tensors)
        assert result.evaluations[0].kl < (0.1 if case.name.startswith("deepseek") else 0.06)


def test_the_table_says_where_outputs_are_added_as_they_are(case: Case) -> None:
    """Checks the outputs of attention (with the MLP silenced) and of the MLP."""
    model = BlockModel(open_source(case.source))
    hidden, architecture = model.start(torch.tensor([TOKENS])), model.architecture
    for index in range(len(model) - 1):
        hidden = model.run(model.block(index), hidden)
    (attention,) = modules_called(model, "attn_output", "attn_output_b") or modules_called(model, "ssm_out")
    last = modules_called(model, "ffn_down", "ffn_down_exps", "ffn_down_shexp")
    for linear, without in ((attention, last), *((only, []) for only in last if len(last) == 1)):
        block = model.block(len(model) - 1)
        for other in without:
            silence(block, other)
        lacking = _without_output_of(model, block, linear, hidden)
        silence(block, linear)
        without_linear = model.run(block, hidden)[..., : lacking.shape[-1]]
        assert torch.allclose(without_linear, lacking, atol=1e-5 * float(lacking.abs().max())) == architecture.adds


def _without_output_of(model: BlockModel, block: torch.nn.Module, linear: str, hidden: torch.Tensor) -> torch.Tensor:
    """Returns the block's output minus a linear's output."""
    outputs: list[torch.Tensor] = []
    # A copy, since some models add to the output in place.
    handle = linear_of(block, linear).register_forward_hook(lambda *caught: outputs.append(caught[2].clone()))
    output = model.run(block, hidden)
    handle.remove()
    return output[..., : outputs[0].shape[-1]] - outputs[0]


def input_of(model: BlockModel, block: torch.nn.Module, linear: str, hidden: torch.Tensor) -> torch.Tensor:
    """Returns what enters a linear when the block runs on `hidden`, [..., C]; of an expert, its tokens alone."""
    entering: list[torch.Tensor] = []
    module = linear_of(block, linear)
    handle = module.register_forward_pre_hook(lambda _, arguments: entering.append(arguments[0]))
    model.run(block, hidden)
    handle.remove()
    return entering[0] if entering else hidden.new_empty(0, module.in_features)


@pytest.mark.parametrize("held", [0, 1])
def test_a_pass_that_pauses_gives_what_passes_to_each_linear_give(case: Case, held: int) -> None:
    """The weights of a group change while the pass is paused there, as they do when the group is solved.

    A pass that is held computes every linear once.
    """
    model = BlockModel(open_source(case.source))
    hidden, index = model.start(torch.tensor([TOKENS])), len(model) - 1
    for before in range(index):
        hidden = model.run(model.block(before), hidden)
    block, whole, last = model.block(index), model.block(index), model.architecture.adders[1]
    groups = execution_order(model, whole, model.architecture.linears_of(index), hidden)
    paused, computed = PausedBlock(model, block, groups, last, {0: hidden}, held), Counter[str]()
    for linear in (linear for group in groups for linear in group):
        linear_of(block, linear).register_forward_hook(lambda *_, linear=linear: computed.update([linear]))
    for group in groups:
        expected = input_of(model, whole, group[0], hidden)
        inputs = paused.added_to(0)[0] if group[0] == last else paused.inputs(group, 0)
        assert torch.equal(inputs, expected)
        for linear in group:
            for each in (block, whole):
                linear_of(each, linear).weight.data *= 1.25
        paused.solved(group)
    output = model.run(whole, hidden)
    assert torch.allclose(paused.output(0), output, atol=1e-6 * float(output.abs().max()))
    assert not held or set(computed.values()) == {1}


def test_smoothing_changes_nothing(case: Case) -> None:
    """Random scales are moved from norms and rows into the linears behind them."""
    source = open_source(case.source)
    plain, draw = BlockModel(source), torch.Generator().manual_seed(1)
    smoothed_pairs = pairs(plain.architecture, len(plain))
    assert bool(smoothed_pairs) == (case.name not in UNSMOOTHED)
    sizes = {pair: source.shape(f"{pair.giver}.weight")[0] for pair in smoothed_pairs}
    scales = {pair: torch.randint(-2, 3, (size,), generator=draw).float().exp2() for pair, size in sizes.items()}
    smoothed = BlockModel(Smoothed(source, scales))
    plain_states, states = plain.start(torch.tensor([TOKENS])), smoothed.start(torch.tensor([TOKENS]))
    for index in range(len(plain)):
        plain_states = plain.run(plain.block(index), plain_states)
        states = smoothed.run(smoothed.block(index), states)
    assert torch.allclose(states, plain_states, atol=1e-4)


def test_weights_kept_in_bfloat16_are_those_that_autocast_makes(case: Case) -> None:
    """Outputs and gradients are equal."""
    model = BlockModel(open_source(case.source), compute_dtype=torch.bfloat16)
    hidden = model.start(torch.tensor([TOKENS]))
    for index in range(len(model)):
        kept, cast = model.block(index), model.block(index)
        for name in model.linears(index):
            weight = model.weights.read(model.weight_name(index, name))
            assert kept.get_submodule(name).weight.dtype == torch.bfloat16
            cast.get_submodule(name).weight.data = weight.float()
        results = []
        for block in (kept, cast):
            inputs = hidden.clone().requires_grad_()
            output = model.run(block, inputs)
            results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
        assert not torch.equal(hidden, results[0][0])
        hidden = results[0][0].detach()


def modules_called(model: BlockModel, *names: str) -> list[str]:
    """Returns the modules of a model's last block that have one of these names in GGUF."""
    return [module for module, gguf in model.architecture.modules_of(len(model) - 1).items() if gguf in names]


def silence(block: torch.nn.Module, linear: str) -> None:
    """Sets a linear's weights and bias to zero."""
    for parameter in block.get_submodule(linear).parameters():
        parameter.data.zero_()


# The table


def test_every_architecture_of_the_table_has_a_case() -> None:
    tested = [architecture_of_case(name).family for name in CASES]
    assert set(tested) == {entry.family for entry in ARCHITECTURES if entry.gguf and not entry.encoder}


def test_docs_show_the_table(root: Path, load_script: Callable[[str], ModuleType]) -> None:
    script, page = load_script("tools/models_table.py"), (root / "docs/models.md").read_text()
    assert script.table(script.tested()) in page
