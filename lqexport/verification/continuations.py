"""Compares what a file says in llama.cpp or mlx-lm with what its source says, taking the likeliest token each time.

The source has no cache of keys and values here, so each run over its blocks must yield many tokens. The file's tokens
are a draft: one run of the source tells up to where it says the same, and what it says there instead. Then the file
continues that, and so on, as in speculative decoding. The source's text is exact as far as it goes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lqexport.errors import UserError
from lqexport.evaluation import protocols
from lqexport.evaluation.chat import prompt_ids
from lqexport.evaluation.evaluate import Evaluation
from lqexport.evaluation.logits import block_logits
from lqexport.models.blocks import BlockModel
from lqexport.models.context import trained_positions
from lqexport.models.interface import Weights
from lqexport.runtime.progress import Listener
from lqexport.verification.talk_record import Continuation

TOKENS = 24
"""The number of tokens after each prompt."""
RUNS = 4
"""The most runs over the source's blocks."""
QUESTIONS = (
    "What is the capital of France?",
    "Write a Python function that adds two numbers.",
    "Count from one to twenty.",
)
"""What a model with a chat template is asked."""
BEGINNINGS = (
    "The capital of France is",
    "def add(a, b):\n    return",
    "one, two, three, four,",
)
"""What a model without one continues."""
FACTOR, LEAST = 10.0, 0.01
"""A file's choice is suspicious if it takes a KL divergence above LEAST nats and FACTOR times the text's largest."""


class Speaks(Protocol):
    """An engine that runs a file: llama.cpp's server, or mlx-lm."""

    def continuation(self, prompt: list[int], count: int, /) -> list[int]:
        """Returns at most `count` tokens that the model continues the prompt with, the likeliest each time."""


@dataclass
class _Said:
    """A prompt, the file's tokens after it, the source's as far as they are known, and the file's draft of the rest.

    difference   index of the first token that differs, the two tokens, and the source's log-probabilities
    """

    text: str
    prompt: list[int]
    file: list[int]
    source: list[int] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)
    difference: tuple[int, int, int, torch.Tensor] | None = None


def prompts(tokenizer: PreTrainedTokenizerBase, config: dict[str, object]) -> dict[str, list[int]]:
    """Returns text -> token ids of the prompts.

    Those that the model has not enough positions for, or that its chat template refuses, are left out.
    """
    if tokenizer.chat_template:
        cut = {text: _asked(tokenizer, text) for text in QUESTIONS}
    else:
        cut = {text: list(tokenizer(text)["input_ids"]) for text in BEGINNINGS}
    most = (trained_positions(dict(config)) or math.inf) - TOKENS
    return {text: ids for text, ids in cut.items() if 0 < len(ids) <= most}


def _asked(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Returns the token ids of a question by the chat template; none if the template refuses it."""
    try:
        return prompt_ids(tokenizer, [{"role": "user", "content": question}])
    except UserError:
        return []


def continuations(
    engine: Speaks, source: Weights, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], device: str,
    listener: Listener,
) -> list[Continuation]:  # fmt: skip
    """Returns what file and source say after each of `prompts`.

    stops   ids at which the source ends
    """
    said = [
        _Said(text, ids, engine.continuation(ids, TOKENS)) for text, ids in prompts(tokenizer, source.config).items()
    ]
    for entry in said:
        entry.draft = entry.file
    for _ in range(RUNS):
        waiting = [entry for entry in said if not _done(entry, stops)]
        if not waiting:
            break
        for entry in waiting:
            if not entry.draft:
                entry.draft = engine.continuation(entry.prompt + entry.source, TOKENS - len(entry.source))
        _follow(waiting, source, device, listener)
    return [_continuation(entry, tokenizer, stops) for entry in said]


def _done(entry: _Said, stops: Sequence[int]) -> bool:
    return len(entry.source) >= TOKENS or _ended(entry.source, stops)


def _ended(tokens: list[int], stops: Sequence[int]) -> bool:
    return bool(tokens) and tokens[-1] in stops


def _follow(said: list[_Said], source: Weights, device: str, listener: Listener) -> None:
    """Runs the source on all drafts at once, and takes each as far as the source says the same, and one token more."""
    known = [entry.prompt + entry.source for entry in said]
    longest = max(len(ids) + len(entry.draft) for ids, entry in zip(known, said, strict=True))
    # What stands behind a draft changes nothing before it.
    rows = np.zeros((len(said), longest), np.int64)
    for row, ids, entry in zip(rows, known, said, strict=True):
        row[: len(ids) + len(entry.draft)] = ids + entry.draft
    protocol = protocols.Protocol("continuations", window=longest, first=1, bos=False)
    predicted = block_logits(BlockModel(source, device), rows, protocol, listener, "Run the source, continuations")
    for entry, ids, logits in zip(said, known, predicted, strict=True):
        _accept(entry, logits[len(ids) - 1 :])


def _accept(entry: _Said, logits: torch.Tensor) -> None:
    """Extends the source's tokens by the draft's, up to the first that the source would not say, and by its own.

    logits   what predicts the draft's tokens, [draft or more, vocabulary]
    """
    draft, entry.draft = entry.draft, []
    for token, row in zip(draft, logits, strict=False):
        best = int(row.argmax())
        index = len(entry.source)
        entry.source.append(best)
        if entry.difference is None and index < len(entry.file) and best != entry.file[index]:
            entry.difference = (index, best, entry.file[index], row.double().log_softmax(-1).cpu())
        if best != token:
            break


def _continuation(entry: _Said, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]) -> Continuation:
    def text(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens))

    shown = (entry.text, text(entry.source), text(entry.file), len(entry.file))
    ended = _ended(entry.file, stops)
    if entry.difference is None:
        return Continuation(*shown, None, ended=ended)
    index, best, other, log = entry.difference
    p, q = float(log[best].exp()), float(log[other].exp())
    return Continuation(*shown, index, text([best]), text([other]), p, q, least_kl(p, q), ended)


def least_kl(p: float, q: float) -> float:
    """Returns the least KL divergence, in nats, of predictions that do not prefer a token of probability p to one of q.

    Of all such predictions, those that give each of the two (p + q) / 2 and leave the rest are the nearest.
    """
    mean = (p + q) / 2
    return sum(value * math.log(value / mean) for value in (p, q) if value > 0)


def suspicious(said: Sequence[Continuation], evaluations: Sequence[Evaluation]) -> list[Continuation]:
    """Returns the continuations that differ by more than the file's loss on the text explains.

    A difference of a file with loss is no fault, since one token changes all that follow. A right file that differs
    loses, at this token, at least `least_kl`, and on the text it lost at most `kl_max` at any of its tokens.
    """
    if not evaluations:
        return []
    allowed = max(LEAST, FACTOR * max(evaluation.kl_max for evaluation in evaluations))
    return [entry for entry in said if entry.difference is not None and entry.least_kl > allowed]
