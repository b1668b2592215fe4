"""The named protocols of an evaluation: how a text is cut into windows, and which of their tokens are scored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lqexport.calibration.sequences import begins_with_bos
from lqexport.calibration.texts import Text
from lqexport.errors import UserError


@dataclass(frozen=True)
class Protocol:
    """How a text is cut into windows, and which tokens are scored. Numbers of different protocols are not comparable.

    window   tokens in a window; windows do not overlap, and a remainder at the end of the text is not used
    first    the first scored token of a window, counted from 0; all tokens after it are scored too
    bos      whether the tokenizer's BOS replaces the first token of every window, if the tokenizer adds a BOS
    """

    name: str
    window: int
    first: int
    bos: bool

    @property
    def scored(self) -> int:
        """The number of scored tokens per window."""
        return self.window - self.first


HF_2048 = Protocol("hf-2048", window=2048, first=1, bos=False)
"""The protocol of the GPTQ and LeanQuant papers: every token but the first of a window is scored."""
LLAMACPP_512 = Protocol("llama.cpp-512", window=512, first=257, bos=True)
"""The protocol of llama-perplexity with its default context.

The second half of a window is scored, so each scored token has 257 or more tokens before it.
"""
PROTOCOLS = {protocol.name: protocol for protocol in (HF_2048, LLAMACPP_512)}
"""The protocols by name."""


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> NDArray[np.int64]:
    """Returns the token ids [n] of a text, with the special tokens that the tokenizer adds by default."""
    return np.array(tokenizer(text, verbose=False)["input_ids"], dtype=np.int64)


def cut(tokens: NDArray[np.int64], protocol: Protocol, bos: int | None, limit: int | None = None) -> NDArray[np.int64]:
    """Returns the windows [count, protocol.window] of a token stream.

    bos     the tokenizer's BOS if it begins a text with one, else None
    limit   the most windows; None for all

    Raises UserError if the text is shorter than one window.
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


def cut_text(
    tokenizer: PreTrainedTokenizerBase, text: Text, protocols: Iterable[Protocol], limit: int | None
) -> dict[Protocol, NDArray[np.int64]]:
    """Returns protocol -> the windows of a text, token ids [count, protocol.window].

    limit   the most windows; None for all

    Raises UserError if the text is shorter than one window.
    """
    tokens = tokenize(tokenizer, text.seen_by(tokenizer))
    bos = tokenizer.bos_token_id if begins_with_bos(tokenizer) else None
    return {protocol: cut(tokens, protocol, bos, limit) for protocol in protocols}
