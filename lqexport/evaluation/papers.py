"""Perplexity as papers on quantization report it: on the texts of GPTQ's evaluation, in windows of 2048 tokens.

    wikitext2   test split, lines joined by blank lines, all windows
    ptb         validation split, sentences joined by blank lines, all windows;  ptb-new: test split, joined by spaces
    c4          256 windows of the first validation file, each from a random position of a random document that is long
                enough, seed 0;  c4-new: the file's first 1100 documents joined by spaces, 256 windows

Every token of a window but its first is scored, and windows are independent (`protocols.HF_2048`). A model with fewer
learned positions gets shorter windows (`fitting.fitted`). GPTQ's published code
(gptq/datautils.py) builds these texts; LeanQuant and most other papers use the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lqexport.calibration.texts import documents, read_text
from lqexport.errors import UserError, check_least
from lqexport.evaluation.evaluate import perplexity_and_error
from lqexport.evaluation.fitting import fitted, window_warnings
from lqexport.evaluation.logits import block_logits
from lqexport.evaluation.protocols import HF_2048, PROTOCOLS, Protocol, cut, cut_text, tokenize
from lqexport.models.adapters import corrected, open_factors
from lqexport.models.blocks import BlockModel
from lqexport.models.tokenizers import tokenizer_of
from lqexport.models.written import open_export
from lqexport.runtime.environment import choose_device
from lqexport.runtime.progress import Listener, Silent

WINDOWS = 256
"""The number of windows of c4 and c4-new."""
Windows = NDArray[np.int64]
"""Token ids [windows, tokens]."""


@dataclass(frozen=True)
class Perplexity:
    """The perplexity on one text.

    text, protocol    the text, and the protocol's name
    windows, tokens   the numbers of windows and scored tokens
    perplexity        exp of the mean negative log-likelihood
    error             one standard error of it
    """

    text: str
    protocol: str
    windows: int
    tokens: int
    perplexity: float
    error: float


WindowsOf = Callable[[PreTrainedTokenizerBase, Protocol], Windows]
"""Returns the windows of a text, as long as the protocol says."""


def _joined(name: str, separator: str, most: int | None = None) -> WindowsOf:
    def windows(tokenizer: PreTrainedTokenizerBase, protocol: Protocol) -> Windows:
        text = separator.join(documents(name, 1100 if most else None))
        return cut(tokenize(tokenizer, text), protocol, None, most)

    return windows


def _random_positions(tokenizer: PreTrainedTokenizerBase, protocol: Protocol) -> Windows:
    texts, draw, length = documents("c4:validation", None), random.Random(0), protocol.window
    windows: list[NDArray[np.int64]] = []
    if not any(len(text) > length for text in texts):
        raise UserError(f"No document of c4's validation file has more than {length} tokens.")
    while len(windows) < WINDOWS:
        tokens = tokenize(tokenizer, texts[draw.randint(0, len(texts) - 1)])
        if len(tokens) > length:
            start = draw.randint(0, len(tokens) - length - 1)
            windows.append(tokens[start : start + length])
    return np.stack(windows)


TEXTS: dict[str, WindowsOf] = {
    "wikitext2": _joined("wikitext2:test", "\n\n"),
    "ptb": _joined("ptb:validation", "\n\n"),
    "ptb-new": _joined("ptb:test", " "),
    "c4": _random_positions,
    "c4-new": _joined("c4:validation", " ", WINDOWS),
}
"""The texts of the papers by name."""


def perplexity(
    file: str | Path,
    texts: Iterable[str] = ("wikitext2",),
    *,
    protocol: str = HF_2048.name,
    windows: int | None = None,
    device: str = "auto",
    listener: Listener | None = None,
) -> list[Perplexity]:
    """Returns the perplexity of a written model on each text.

    file       a .gguf file, native or EXL2 folder, or artifact; its low-rank corrections are added
    texts      names in TEXTS, or texts that `texts.read_text` knows: files, python-heldout
    protocol   the protocol for texts that are not in TEXTS
    windows    the most windows of each text

    lqexport decodes the model itself and runs it block by block in float32. Raises UserError if the protocol is
    unknown, or if the model or a text cannot be read.
    """
    check_least(1, windows=windows)
    path, listener = Path(file), listener or Silent()
    if protocol not in PROTOCOLS:
        raise UserError(f"Unknown protocol {protocol!r}. Known: {', '.join(PROTOCOLS)}.")
    tokenizer, export = tokenizer_of(path), open_export(path)
    protocols = {text: HF_2048 if text in TEXTS else PROTOCOLS[protocol] for text in texts}
    for chosen in dict.fromkeys(protocols.values()):
        for sentence in window_warnings(chosen, export.config):
            listener.message(sentence)
    fitting = {text: fitted(chosen, export.config) for text, chosen in protocols.items()}
    windows_of = {text: _windows(text, chosen, tokenizer, windows) for text, chosen in fitting.items()}
    factors = open_factors(path, None, export.config)
    model = BlockModel(corrected(export, factors), choose_device(device))
    return [_measured(model, text, fitting[text], windows_of[text], listener) for text in windows_of]


def _windows(text: str, protocol: Protocol, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> Windows:
    if text in TEXTS:
        return TEXTS[text](tokenizer, protocol)[:limit]
    return cut_text(tokenizer, read_text(text), [protocol], limit)[protocol]


def _measured(model: BlockModel, text: str, protocol: Protocol, windows: Windows, listener: Listener) -> Perplexity:
    logits = block_logits(model, windows, protocol, listener, f"Run on {text}")
    losses = []
    for window, predicted in zip(windows, logits, strict=True):
        targets = torch.from_numpy(window[protocol.first :]).to(predicted.device)
        losses.append(torch.nn.functional.cross_entropy(predicted.double(), targets, reduction="none").cpu().numpy())
    value, error = perplexity_and_error(np.stack(losses))
    return Perplexity(text, protocol.name, len(windows), windows.shape[0] * protocol.scored, value, error)
