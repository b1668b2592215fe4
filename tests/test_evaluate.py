"""Protocols, scores and their sums, compared with values computed by hand and directly in float64."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lqexport.errors import UserError
from lqexport.evaluation.evaluate import Accumulator, compare, mean_and_error, score
from lqexport.evaluation.logits import block_logits, engine_logits
from lqexport.evaluation.protocols import HF_2048, LLAMACPP_512, PROTOCOLS, Protocol, cut
from lqexport.models.blocks import BlockModel

SMALL = Protocol("small", window=8, first=3, bos=False)


def test_protocols_score_what_their_originals_score() -> None:
    """GPTQ's protocol scores 2047 targets of 2048. llama-perplexity scores 255 of 512, from n_ctx/2 + 1 on."""
    assert [(p.name, p.window, p.first, p.scored, p.bos) for p in PROTOCOLS.values()] == [
        ("hf-2048", 2048, 1, 2047, False),
        ("llama.cpp-512", 512, 257, 255, True),
    ]


def test_windows_follow_each_other() -> None:
    windows = cut(np.arange(1100), LLAMACPP_512, bos=None)
    assert windows.tolist() == [list(range(512)), list(range(512, 1024))]
    assert len(cut(np.arange(1100), LLAMACPP_512, bos=None, limit=1)) == 1


def test_bos_replaces_the_first_token_only_where_the_protocol_says() -> None:
    tokens = np.arange(4096)
    windows = cut(tokens, LLAMACPP_512, bos=9999)
    assert windows[:, 0].tolist() == [9999] * 8
    assert np.array_equal(windows[:, 1:], tokens.reshape(8, 512)[:, 1:])
    assert np.array_equal(cut(tokens, HF_2048, bos=9999), tokens.reshape(2, 2048))
    assert np.array_equal(tokens, np.arange(4096))


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_short_texts_are_refused(protocol: Protocol) -> None:
    with pytest.raises(UserError, match=f"has {protocol.window - 1} tokens.*needs {protocol.window}"):
        cut(np.arange(protocol.window - 1), protocol, bos=None)


def test_scores_by_hand() -> None:
    """Two tokens: the source predicts 3/4 and 1/4 each time; the file predicts 1/2 and 1/2, then 1/4 and 3/4."""
    reference = torch.log(torch.tensor([[3.0, 1.0], [3.0, 1.0]])) + 5
    test = torch.log(torch.tensor([[1.0, 1.0], [1.0, 3.0]])) - 2
    scores = score(reference, test, torch.tensor([0, 1]))
    assert np.allclose(scores.reference, [math.log(4 / 3), math.log(4)], rtol=1e-6)
    assert np.allclose(scores.test, [math.log(2), math.log(4 / 3)], rtol=1e-6)
    first = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    second = 0.75 * math.log(3) - 0.25 * math.log(3)
    assert np.allclose(scores.divergence, [first, second], rtol=1e-6)
    assert scores.agrees.tolist() == [True, False]


def test_scores_equal_a_direct_float64_computation() -> None:
    random = np.random.default_rng(0)
    reference = (10 * random.standard_normal((300, 50))).astype(np.float32)
    test = (reference + random.standard_normal((300, 50))).astype(np.float32)
    targets = random.integers(0, 50, 300)
    p, q = (np.exp(x.astype(np.float64)) for x in (reference, test))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    scores = score(torch.from_numpy(reference), torch.from_numpy(test), torch.from_numpy(targets))
    rows = np.arange(300)
    assert np.allclose(scores.reference, -np.log(p[rows, targets]), rtol=1e-10)
    assert np.allclose(scores.test, -np.log(q[rows, targets]), rtol=1e-10)
    assert np.allclose(scores.divergence, (p * np.log(p / q)).sum(1), rtol=1e-10, atol=1e-14)
    assert np.array_equal(scores.agrees, reference.argmax(1) == test.argmax(1))


def test_a_tiny_divergence_is_not_lost() -> None:
    """With logits of 1e4, float32 has no digits left for a divergence of 1e-8, but float64 has."""
    reference = torch.tensor([[10000.0, 10000.0]])
    test = torch.tensor([[10000.0, 10000.0 + 2**-10]])
    expected = math.log(math.cosh(2**-11))
    assert score(reference, test, torch.tensor([0])).divergence[0] == pytest.approx(expected, rel=1e-6)


def test_different_vocabularies_are_refused() -> None:
    with pytest.raises(UserError, match="predicts 7 tokens and the file 8"):
        score(torch.zeros(3, 7), torch.zeros(3, 8), torch.zeros(3, dtype=torch.int64))


def test_mean_and_error_by_hand() -> None:
    mean, error = mean_and_error(np.array([1.0, 2.0, 3.0, 6.0]))
    assert mean == 3.0
    assert error == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 4 / 3))
    assert math.isnan(mean_and_error(np.array([1.0]))[1])


def logits_of(probabilities: list[list[float]]) -> torch.Tensor:
    return torch.log(torch.tensor(probabilities))


def test_evaluation_by_hand() -> None:
    """Two windows of two scored tokens. The source gives every target 1/2; the file gives 1/4, 1/4, 1/8 and 1/2."""
    protocol = Protocol("tiny", window=3, first=1, bos=False)
    accumulator = Accumulator(protocol)
    sure, half, quarter = [0.5, 0.3, 0.2], [0.25, 0.5, 0.25], [0.125, 0.5, 0.375]
    accumulator.add(logits_of([sure, sure]), logits_of([half, half]), np.array([2, 0, 0]))
    accumulator.add(logits_of([sure, sure]), logits_of([quarter, sure]), np.array([1, 0, 0]))
    result = accumulator.result()
    assert (result.protocol, result.windows, result.tokens) == ("tiny", 2, 4)
    nll = np.log([4, 4, 8, 2])
    assert result.perplexity == pytest.approx(4)
    assert result.perplexity_error == pytest.approx(4 * nll.std() / math.sqrt(3))
    assert result.reference_perplexity == pytest.approx(2)
    assert result.reference_perplexity_error == pytest.approx(0, abs=1e-6)
    assert result.perplexity_ratio == pytest.approx(2)
    assert result.ln_ratio_error == pytest.approx(nll.std() / math.sqrt(3))
    far = 0.5 * math.log(2) + 0.3 * math.log(0.6) + 0.2 * math.log(0.8)
    farther = 0.5 * math.log(4) + 0.3 * math.log(0.6) + 0.2 * math.log(8 / 15)
    divergence = np.array([[far, far], [farther, 0]])
    assert result.kl == pytest.approx(divergence.mean())
    assert result.kl_error == pytest.approx(divergence.std() / math.sqrt(3))
    assert result.kl_max == pytest.approx(farther)
    assert far < result.kl_99 < farther
    assert result.top1 == 0.25
    assert result.kl_by_window == pytest.approx(divergence.mean(1).tolist())
    assert result.kl_by_position == pytest.approx(divergence.mean(0).tolist())


def test_not_a_number_is_not_hidden() -> None:
    logits = torch.zeros(5, 4)
    broken = logits.clone()
    broken[2, 1] = math.nan
    result = compare([logits], [broken], np.zeros((1, 8), np.int64), SMALL)
    assert math.isnan(result.perplexity)
    assert math.isnan(result.kl)


def test_overflowing_perplexity_is_infinite() -> None:
    broken = torch.tensor([[2000.0, 0.0]] * 5)
    result = compare([torch.zeros(5, 2)], [broken], np.ones((1, 8), np.int64), SMALL)
    assert result.perplexity == math.inf
    assert result.perplexity_ratio == math.inf


def test_different_numbers_of_windows_are_an_error() -> None:
    logits = torch.zeros(5, 4)
    with pytest.raises(ValueError, match="zip"):
        compare([logits], [logits], np.zeros((2, 8), np.int64), SMALL)


class Recorder:
    """A listener that records its stages and how much of each was done."""

    def __init__(self) -> None:
        self.stages: list[list[float | str]] = []

    def stage(self, description: str, total: float) -> None:
        self.stages.append([description, total, 0.0])

    def advance(self, amount: float) -> None:
        self.stages[-1][2] += amount  # type: ignore[operator]

    def message(self, text: str) -> None:
        raise AssertionError(text)


class InMemory:
    """The weights of a transformers model."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.config = json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": ["LlamaForCausalLM"]}
        self.tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def small_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.3)).eval()


def test_blocks_give_the_models_logits_at_the_scored_positions() -> None:
    model, windows = small_model(0), np.random.default_rng(0).integers(0, 30, (3, 8))
    recorder = Recorder()
    streamed = list(block_logits(BlockModel(InMemory(model)), windows, SMALL, recorder, "Source"))
    with torch.no_grad():
        whole = model(torch.from_numpy(windows)).logits
    assert len(streamed) == 3
    for ours, theirs in zip(streamed, whole, strict=True):
        # Positions 2..6 predict tokens 3..7.
        assert torch.allclose(ours, theirs[2:7], atol=1e-5)
    assert recorder.stages == [["Source", 6, 6]]


def test_perplexity_is_that_of_transformers() -> None:
    """Compares with transformers' own loss over windows in which every token but the first is a target."""
    protocol = Protocol("all", window=8, first=1, bos=False)
    model, other = small_model(0), small_model(1)
    windows = np.random.default_rng(0).integers(0, 30, (3, 8))
    streams = [block_logits(BlockModel(InMemory(m)), windows, protocol, Recorder(), "") for m in (model, other)]
    result = compare(*streams, windows, protocol)
    ids = torch.from_numpy(windows)
    with torch.no_grad():
        losses = [m(ids, labels=ids).loss.item() for m in (model, other)]
    assert result.reference_perplexity == pytest.approx(math.exp(losses[0]), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(losses[1]), rel=1e-5)
    assert result.ln_ratio == pytest.approx(losses[1] - losses[0], rel=1e-4)


def test_a_model_against_itself() -> None:
    model, windows = small_model(0), np.random.default_rng(0).integers(0, 30, (2, 8))
    streams = [block_logits(BlockModel(InMemory(model)), windows, SMALL, Recorder(), "") for _ in range(2)]
    result = compare(*streams, windows, SMALL)
    assert (result.kl, result.kl_max, result.top1, result.ln_ratio, result.perplexity_ratio) == (0, 0, 1, 0, 1)


def test_engine_logits_are_cut_like_those_of_blocks() -> None:
    """A stand-in for an engine, whose logits tell their position."""

    def logits(tokens: list[int], first: int) -> np.ndarray:
        return np.arange(first, len(tokens), dtype=np.float32)[:, None]

    engine = SimpleNamespace(logits=logits)
    (positions,) = engine_logits(engine, np.zeros((1, 8), np.int64), SMALL)  # type: ignore[arg-type]
    assert positions[:, 0].tolist() == [2, 3, 4, 5, 6]
