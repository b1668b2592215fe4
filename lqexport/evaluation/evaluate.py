"""Perplexity, KL divergence and top-1 agreement of a model against its source, by two named protocols.

Both models see the same windows of the same tokens. Each yields the logits of one window at a time, so a model larger
than memory can be evaluated, and only a few numbers per scored token are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lqexport.converters.models.architecture import Architecture
from lqexport.errors import UserError
from lqexport.evaluation.llamacpp import LlamaCpp
from lqexport.models.blocks import BlockModel
from lqexport.runtime.progress import Listener, Silent


@dataclass(frozen=True)
class Protocol:
    """How a text is cut into windows and which tokens count. Numbers of different protocols do not compare.

    window   tokens in a window; windows do not overlap, and what is left at the end is not used
    first    the first token of a window that is scored (from 0); all after it are
    bos      whether the first token of every window is replaced by the tokenizer's BOS, where it adds one
    """

    name: str
    window: int
    first: int
    bos: bool

    @property
    def scored(self) -> int:
        """Scored tokens per window."""
        return self.window - self.first


HF_2048 = Protocol("hf-2048", window=2048, first=1, bos=False)
"""As the GPTQ and LeanQuant papers: every token but the first of a window is scored."""

LLAMACPP_512 = Protocol("llama.cpp-512", window=512, first=257, bos=True)
"""As llama-perplexity with its default context: the second half is scored, so each token has 257 or more before it."""

WORST = 12
"""Tokens that an evaluation keeps of those whose predictions changed most."""

PROTOCOLS = {protocol.name: protocol for protocol in (HF_2048, LLAMACPP_512)}


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> NDArray[np.int64]:
    """Token ids [n] of a text, with the special tokens that the tokenizer adds by itself."""
    return np.array(tokenizer(text, verbose=False)["input_ids"], dtype=np.int64)


def cut(tokens: NDArray[np.int64], protocol: Protocol, bos: int | None, limit: int | None = None) -> NDArray[np.int64]:
    """Windows [count, protocol.window] of a token stream, at most `limit`, or UserError where the text is too short.

    bos   the tokenizer's BOS where it begins a text with one, else None
    """
    count = len(tokens) // protocol.window
    if count == 0:
        raise UserError(
            f"The evaluation text has {len(tokens)} tokens, and one window of {protocol.name} needs {protocol.window}. "
            "Give a longer text."
        )
    count = count if limit is None else min(count, limit)
    windows = tokens[: count * protocol.window].reshape(count, protocol.window).copy()
    if protocol.bos and bos is not None:
        windows[:, 0] = bos
    return windows


def check_predicts(architecture: Architecture) -> None:
    """Raises UserError for an encoder."""
    if architecture.encoder:
        raise UserError(
            f"{architecture.classes[0]} is an encoder, which predicts no tokens: `lqexport verify` compares its "
            "embeddings."
        )


@dataclass(frozen=True)
class BlockLogits:
    """Logits [scored tokens, vocabulary] of a model, window by window, as often as they are iterated over.

    hidden   states [1, scored tokens, hidden] after the last block, one per window
    """

    model: BlockModel
    hidden: list[torch.Tensor]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self.model.logits(state)[0] for state in self.hidden)


def block_logits(
    model: BlockModel, windows: NDArray[np.int64], protocol: Protocol, listener: Listener, description: str
) -> BlockLogits:
    """Logits [protocol.scored, vocabulary] that predict the scored tokens, window by window.

    Every decoder block runs over all windows before the next one is loaded, so memory holds one block's weights and
    one hidden state per token. That is done at the call; iterating only applies the head. Raises UserError for an
    encoder.
    """
    check_predicts(model.architecture)
    listener.stage(description, len(model) * len(windows))
    hidden = [model.start(torch.from_numpy(window)[None]) for window in windows]
    model.let_go()
    for _, block in model.blocks():
        with torch.no_grad():
            for window, state in enumerate(hidden):
                hidden[window] = model.run(block, state)
                listener.advance(1)
    return BlockLogits(model, [state[:, protocol.first - 1 : -1] for state in hidden])


def engine_logits(engine: LlamaCpp, windows: NDArray[np.int64], protocol: Protocol) -> Iterator[torch.Tensor]:
    """The same, computed by llama.cpp as the iterator goes."""
    for window in windows:
        yield torch.from_numpy(engine.logits(window.tolist(), protocol.first - 1)[:-1])


@dataclass
class TokenScores:
    """What is kept per scored token: float64 [tokens] each, except `agrees`, which is bool.

    reference, test   negative log-likelihood in nats
    divergence        KL(reference || test) of the predicted distributions, in nats
    agrees            whether both put the same token first
    reference_top, test_top   the token that each puts first, int64
    """

    reference: NDArray[np.float64]
    test: NDArray[np.float64]
    divergence: NDArray[np.float64]
    agrees: NDArray[np.bool_]
    reference_top: NDArray[np.int64]
    test_top: NDArray[np.int64]


def score(reference: torch.Tensor, test: torch.Tensor, targets: torch.Tensor, rows: int = 128) -> TokenScores:
    """Scores of logits [n, vocabulary] against token ids [n], in float64, `rows` positions at a time.

    Raises UserError where the two vocabularies differ.
    """
    if reference.shape != test.shape:
        raise UserError(
            f"The source predicts {reference.shape[-1]} tokens and the file {test.shape[-1]}: not the same vocabulary."
        )
    parts = [
        _score_rows(reference[start : start + rows], test[start : start + rows], targets[start : start + rows])
        for start in range(0, len(targets), rows)
    ]
    return TokenScores(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))


def _score_rows(reference: torch.Tensor, test: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    reference_top, test_top = reference.argmax(-1), test.to(reference.device).argmax(-1)
    p = torch.log_softmax(reference.double(), -1)
    q = torch.log_softmax(test.to(reference.device).double(), -1)
    chosen = targets.to(reference.device)[:, None]
    divergence = (p.exp() * (p - q)).sum(-1)
    nll = (-p.gather(-1, chosen)[:, 0], -q.gather(-1, chosen)[:, 0])
    return *nll, divergence, reference_top == test_top, reference_top, test_top


@dataclass(frozen=True)
class Worst:
    """A token whose prediction the file changed most.

    window, position   which window of the text, and which token of the window is predicted
    kl                 KL(source || model) of the prediction, in nats
    probability, reference_probability   of the token that came, by the model and by the source
    top, reference_top   the token that each puts first
    """

    window: int
    position: int
    kl: float
    probability: float
    reference_probability: float
    top: int
    reference_top: int


@dataclass(frozen=True)
class Evaluation:
    """How far a model is from its source on one text, by one protocol. Every `_error` is one standard error.

    perplexity, reference_perplexity   exp of the mean negative log-likelihood
    ln_ratio         ln(perplexity / reference_perplexity); its error uses that both saw the same tokens
    kl, kl_99, kl_max   mean, 99th percentile and maximum of KL(source || model) per token, in nats
    top1             share of tokens where both put the same token first
    kl_by_window, kl_by_position   means, for plots; positions in at most 64 bins
    worst            the WORST tokens of the largest KL divergence, that first
    """

    protocol: str
    windows: int
    tokens: int
    perplexity: float
    perplexity_error: float
    reference_perplexity: float
    reference_perplexity_error: float
    ln_ratio: float
    ln_ratio_error: float
    kl: float
    kl_error: float
    kl_99: float
    kl_max: float
    top1: float
    top1_error: float
    kl_by_window: list[float] = field(default_factory=list)
    kl_by_position: list[float] = field(default_factory=list)
    worst: list[Worst] = field(default_factory=list)

    @property
    def perplexity_ratio(self) -> float:
        return _exp(self.ln_ratio)


class Accumulator:
    """Collects the scores of windows, one at a time, and sums them up."""

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self._windows: list[TokenScores] = []

    def add(self, reference: torch.Tensor, test: torch.Tensor, window: NDArray[np.int64]) -> None:
        """Add one window: both models' logits [protocol.scored, vocabulary], and the window's tokens."""
        self._windows.append(score(reference, test, torch.from_numpy(window[self.protocol.first :])))

    def result(self) -> Evaluation:
        """Sums over all windows so far, at least one."""
        reference, test, divergence, agrees = (
            np.stack([getattr(window, name) for window in self._windows])
            for name in ("reference", "test", "divergence", "agrees")
        )
        kl, kl_error = mean_and_error(divergence)
        top1, top1_error = mean_and_error(agrees.astype(np.float64))
        ln_ratio, ln_ratio_error = mean_and_error(test - reference)
        perplexity, perplexity_error = perplexity_and_error(test)
        reference_perplexity, reference_error = perplexity_and_error(reference)
        return Evaluation(
            self.protocol.name, len(self._windows), divergence.size,
            perplexity, perplexity_error, reference_perplexity, reference_error, ln_ratio, ln_ratio_error,
            kl, kl_error, float(np.percentile(divergence, 99)), float(divergence.max()), top1, top1_error,
            divergence.mean(1).tolist(), [float(part.mean()) for part in _bins(divergence, 64)],
            self._worst(divergence),
        )  # fmt: skip

    def _worst(self, divergence: NDArray[np.float64]) -> list[Worst]:
        """divergence   [windows, scored tokens]"""
        # What is not a number counts as least.
        order = np.argsort(-np.nan_to_num(divergence, nan=-1), axis=None, kind="stable")[:WORST]
        found = []
        for window, index in zip(*np.unravel_index(order, divergence.shape), strict=True):
            scores = self._windows[window]
            found.append(
                Worst(
                    int(window),
                    int(index) + self.protocol.first,
                    float(divergence[window, index]),
                    float(np.exp(-scores.test[index])),
                    float(np.exp(-scores.reference[index])),
                    int(scores.test_top[index]),
                    int(scores.reference_top[index]),
                )
            )
        return found


def _bins(values: NDArray[np.float64], count: int) -> list[NDArray[np.float64]]:
    """Columns of [windows, positions] in at most `count` bins of nearly equal width."""
    return np.array_split(values, min(count, values.shape[1]), axis=1)


def mean_and_error(values: NDArray[np.float64]) -> tuple[float, float]:
    """Mean, and its standard error sqrt(variance / (n - 1)) with the variance over n, as llama-perplexity has it."""
    error = math.sqrt(values.var() / (values.size - 1)) if values.size > 1 else math.nan
    return float(values.mean()), error


def perplexity_and_error(nll: NDArray[np.float64]) -> tuple[float, float]:
    """exp(mean) of negative log-likelihoods, and its standard error to first order: perplexity times the mean's."""
    mean, error = mean_and_error(nll)
    return _exp(mean), _exp(mean) * error


def _exp(value: float) -> float:
    """exp, infinite where it does not fit."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def compare(
    reference: Iterable[torch.Tensor],
    test: Iterable[torch.Tensor],
    windows: NDArray[np.int64],
    protocol: Protocol,
    listener: Listener | None = None,
) -> Evaluation:
    """Evaluate one stream of logits against another, window by window (see `block_logits`, `engine_logits`)."""
    listener = listener or Silent()
    accumulator = Accumulator(protocol)
    listener.stage(f"Compare, {protocol.name}", len(windows))
    for ours, theirs, window in zip(reference, test, windows, strict=True):
        accumulator.add(ours, theirs, window)
        listener.advance(1)
    return accumulator.result()
