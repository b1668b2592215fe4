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
from lqexport.converters.models.architectures import architecture_of
from lqexport.errors import UserError, check_least, files_at_hand
from lqexport.evaluation.evaluate import perplexity_and_error
from lqexport.evaluation.fitting import fitted, window_warnings
from lqexport.evaluation.logits import block_logits, check_predicts
from lqexport.evaluation.protocols import HF_2048, PROTOCOLS, Protocol, cut, cut_text, tokenize
from lqexport.models.any_model import AnyModel, open_model
from lqexport.models.blocks import BlockModel
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


@files_at_hand()
def perplexity(
    file: str | Path,
    texts: Iterable[str] = ("wikitext2",),
    *,
    protocol: str = HF_2048.name,
    windows: int | None = None,
    device: str = "auto",
    listener: Listener | None = None,
) -> list[Perplexity]:
    """Returns the perplexity of a model on each text.

    file       a .gguf file, a folder that lqexport wrote, or a Hugging Face folder or hub id, quantized or not; the
               low-rank corrections of a written model are added
    texts      names in TEXTS, or texts that `texts.read_text` knows: files, python-heldout
    protocol   the protocol for texts that are not in TEXTS
    windows    the most windows of each text

    lqexport decodes the model itself and runs it block by block in float32. Raises UserError if the protocol is
    unknown, or if the model or a text cannot be read.
    """
    check_cutting(protocol, windows)
    model, chosen, listener = open_model(file), choose_device(device), listener or Silent()
    return perplexity_on(cut_texts(model, texts, protocol, windows, listener), model, chosen, listener)


@dataclass(frozen=True)
class Cut:
    """A text as a model runs on it: token ids [windows, tokens], cut by a protocol."""

    text: str
    protocol: Protocol
    windows: Windows


def check_cutting(protocol: str, windows: int | None) -> None:
    """Raises UserError if the protocol is unknown, or the number of windows is not positive."""
    check_least(1, windows=windows)
    if protocol not in PROTOCOLS:
        raise UserError(f"Unknown protocol {protocol!r}. Known: {', '.join(PROTOCOLS)}.")


def cut_texts(
    model: AnyModel, texts: Iterable[str], protocol: str, windows: int | None, listener: Listener
) -> list[Cut]:
    """Returns each text, cut by the model's tokenizer. The arguments are those of `perplexity`, which says the errors.

    The listener is told where windows do not fit the model's context.
    """
    config = model.weights.config
    check_predicts(architecture_of(config))
    protocols = {text: HF_2048 if text in TEXTS else PROTOCOLS[protocol] for text in texts}
    for chosen in dict.fromkeys(protocols.values()):
        for sentence in window_warnings(chosen, config):
            listener.message(sentence)
    tokenizer = model.tokenizer()
    fitting = {text: fitted(chosen, config) for text, chosen in protocols.items()}
    return [Cut(text, chosen, _windows(text, chosen, tokenizer, windows)) for text, chosen in fitting.items()]


def perplexity_on(cuts: Iterable[Cut], model: AnyModel, device: torch.device, listener: Listener) -> list[Perplexity]:
    """Returns a model's perplexity on texts that are cut into windows of tokens."""
    blocks, name = BlockModel(model.weights, device), Path(model.name).absolute().name
    return [_measured(blocks, each, f"Run {name} on {each.text}", listener) for each in cuts]


def _windows(text: str, protocol: Protocol, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> Windows:
    if text in TEXTS:
        return TEXTS[text](tokenizer, protocol)[:limit]
    return cut_text(tokenizer, read_text(text), [protocol], limit)[protocol]


def _measured(model: BlockModel, text: Cut, description: str, listener: Listener) -> Perplexity:
    protocol, windows = text.protocol, text.windows
    logits = block_logits(model, windows, protocol, listener, description)
    losses = []
    for window, predicted in zip(windows, logits, strict=True):
        targets = torch.from_numpy(window[protocol.first :]).to(predicted.device)
        losses.append(torch.nn.functional.cross_entropy(predicted.double(), targets, reduction="none").cpu().numpy())
    value, error = perplexity_and_error(np.stack(losses))
    return Perplexity(text.text, protocol.name, len(windows), windows.shape[0] * protocol.scored, value, error)
