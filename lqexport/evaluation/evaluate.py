"""Computes perplexity, KL divergence and top-1 agreement of a model against its source, from the logits of both.

Both run on the same windows of the same tokens (`protocols`), and yield the logits of one window at a time (`logits`).
Only a few numbers per scored token are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from lqexport.errors import UserError
from lqexport.evaluation.protocols import Protocol
from lqexport.runtime.progress import Listener, Silent

WORST = 12
"""The number of tokens that an evaluation lists as those whose predictions changed most."""


@dataclass
class TokenScores:
    """The numbers that are kept for each scored token, arrays of shape [tokens].

    reference, test   negative log-likelihood by the source and by the model, in nats, float64
    divergence        KL(reference || test) of the predicted distributions, in nats, float64
    agrees            whether both rank the same token first, bool
    reference_top, test_top   the token that each ranks first, int64
    """

    reference: NDArray[np.float64]
    test: NDArray[np.float64]
    divergence: NDArray[np.float64]
    agrees: NDArray[np.bool_]
    reference_top: NDArray[np.int64]
    test_top: NDArray[np.int64]


def score(reference: torch.Tensor, test: torch.Tensor, targets: torch.Tensor, rows: int = 128) -> TokenScores:
    """Returns the scores of two models' logits [n, vocabulary] for the token ids `targets` [n], computed in float64.

    rows   the number of positions that are processed at a time

    Raises UserError if the vocabularies differ in size.
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
    columns = targets.to(reference.device)[:, None]
    divergence = (p.exp() * (p - q)).sum(-1)
    nll = (-p.gather(-1, columns)[:, 0], -q.gather(-1, columns)[:, 0])
    return *nll, divergence, reference_top == test_top, reference_top, test_top


@dataclass(frozen=True)
class Worst:
    """One of the tokens whose predictions differ most between the model and its source.

    window, position   the window of the text, and the position in it of the predicted token
    kl                 KL(source || model) of the prediction, in nats
    probability, reference_probability   the probability of the actual token by the model and by the source
    top, reference_top   the token that the model and the source rank first
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
    """The difference between a model and its source on one text, by one protocol.

    protocol, windows, tokens   the protocol's name, and the numbers of windows and scored tokens
    perplexity, reference_perplexity   exp of the mean negative log-likelihood, of the model and of the source
    ln_ratio         ln(perplexity / reference_perplexity); its error is of the paired differences, since both models
                     ran on the same tokens
    kl, kl_99, kl_max   mean, 99th percentile and maximum of KL(source || model) per token, in nats
    top1             the share of tokens for which both rank the same token first
    kl_by_window, kl_by_position   mean KL divergences, for plots; positions in at most 64 bins
    worst            the WORST tokens with the largest KL divergence, largest first

    Every `_error` is one standard error.
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
    """Collects the scores of windows, one window at a time, and computes the evaluation of all of them."""

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self._windows: list[TokenScores] = []

    def add(self, reference: torch.Tensor, test: torch.Tensor, window: NDArray[np.int64]) -> None:
        """Adds one window.

        reference, test   the logits [protocol.scored, vocabulary] of the source and of the model
        window            the window's token ids [protocol.window]

        Raises UserError as `score` does.
        """
        self._windows.append(score(reference, test, torch.from_numpy(window[self.protocol.first :])))

    def result(self) -> Evaluation:
        """Returns the evaluation of all windows so far, of which there must be at least one."""
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
            divergence.mean(1).tolist(), [float(columns.mean()) for columns in _bins(divergence, 64)],
            self._worst(divergence),
        )  # fmt: skip

    def _worst(self, divergence: NDArray[np.float64]) -> list[Worst]:
        """Returns the WORST tokens with the largest divergence [windows, scored tokens], largest first."""
        # NaN sorts last.
        order = np.argsort(-np.nan_to_num(divergence, nan=-1), axis=None, kind="stable")[:WORST]
        worst = []
        for window, index in zip(*np.unravel_index(order, divergence.shape), strict=True):
            scores = self._windows[window]
            worst.append(
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
        return worst


def _bins(values: NDArray[np.float64], count: int) -> list[NDArray[np.float64]]:
    """Returns the columns of `values` [windows, positions] in at most `count` bins of nearly equal width."""
    return np.array_split(values, min(count, values.shape[1]), axis=1)


def mean_and_error(values: NDArray[np.float64]) -> tuple[float, float]:
    """Returns the mean of n values and its standard error, as llama-perplexity computes it.

    The error is sqrt(variance / (n - 1)), where the variance is the mean of the squared deviations (divided by n). It
    is NaN for one value.
    """
    error = math.sqrt(values.var() / (values.size - 1)) if values.size > 1 else math.nan
    return float(values.mean()), error


def perplexity_and_error(nll: NDArray[np.float64]) -> tuple[float, float]:
    """Returns the perplexity, exp of the mean negative log-likelihood, and its standard error.

    The error is to first order: the perplexity times the standard error of the mean.
    """
    mean, error = mean_and_error(nll)
    return _exp(mean), _exp(mean) * error


def _exp(value: float) -> float:
    """Returns exp(value), or infinity if it overflows."""
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
    """Returns the evaluation of the logits `test` against the logits `reference`.

    reference, test   the logits [protocol.scored, vocabulary] of each window, as `block_logits` and `engine_logits`
                      give them
    windows           the token ids [count, protocol.window]

    Raises UserError as `score` does.
    """
    listener = listener or Silent()
    accumulator = Accumulator(protocol)
    listener.stage(f"Compare, {protocol.name}", len(windows))
    for reference_logits, test_logits, window in zip(reference, test, windows, strict=True):
        accumulator.add(reference_logits, test_logits, window)
        listener.advance(1)
    return accumulator.result()
