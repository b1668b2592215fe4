"""Draws token sequences to calibrate on from a text, and measures how much of one text is in another."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from lqexport.calibration.texts import read_text
from lqexport.errors import UserError

SHINGLE = 50
"""Characters in a run of text that `overlap` compares."""


@dataclass(frozen=True)
class Calibration:
    """The sequences of tokens to calibrate on, and where they come from.

    tokens        int64 [samples, sequence_length]
    name          the text's name or file, as the user gave it
    sha256        SHA-256 of the whole text as the model sees it, in hexadecimal
    text_tokens   number of tokens in the whole text
    bos           whether every sequence begins with the beginning-of-sequence token (BERT's [CLS])
    separator     whether every sequence ends with an encoder's last token (BERT's [SEP])
    """

    tokens: torch.Tensor
    name: str
    sha256: str
    text_tokens: int
    bos: bool
    separator: bool = False

    @property
    def repeats(self) -> bool:
        """Whether the text is too short for sequences that do not overlap."""
        samples, length = self.tokens.shape
        return samples > self.text_tokens // (length - self.bos - self.separator)

    def tokens_sha256(self, samples: int | None = None) -> str:
        """Returns the SHA-256 (hex) of the token ids of the first `samples` sequences; None for all."""
        return hashlib.sha256(self.tokens[:samples].numpy().tobytes()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """Returns what run.json records of the calibration."""
        samples, length = self.tokens.shape
        facts = {"name": self.name, "sha256": self.sha256, "text_tokens": self.text_tokens, "bos": self.bos}
        return facts | {"samples": samples, "sequence_length": length, "tokens_sha256": self.tokens_sha256()}


def load_calibration(
    name_or_file: str, tokenizer: Any, *, samples: int, sequence_length: int, seed: int, encoder: bool = False
) -> Calibration:
    """Returns random windows of a text, each with the special tokens that the model sees when it runs.

    The text is tokenized once, without special tokens but those of the chat template, which its conversations go
    through. If the tokenizer begins its output with a beginning-of-sequence token (Llama 2 and 3 do, SmolLM2 does not),
    each window begins with it and has `sequence_length - 1` tokens of text.
    An encoder's windows stand between the tokens that its tokenizer puts around a text, such as [CLS] and [SEP]. Other
    windows are text alone.

    encoder   whether the model is an encoder

    Windows do not overlap until the text is used up; only then more are drawn, at another offset. Equal arguments give
    equal tokens.

    Raises UserError if the text is unknown, cannot be read, or holds fewer tokens than one window.
    """
    text = read_text(name_or_file)
    before, after = _around(tokenizer) if encoder else _before(tokenizer)
    content = text.seen_by(tokenizer)
    ids = torch.tensor(tokenizer(content, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)
    length = sequence_length - len(before) - len(after)
    if len(ids) < length:
        raise UserError(
            f"The text {name_or_file} has {len(ids)} tokens, and a sequence of {sequence_length} needs {length}. "
            "Give a longer text or a smaller --sequence-length."
        )
    starts = _window_starts(len(ids), length, samples, seed)
    windows = [torch.cat([before, ids[start : start + length], after]) for start in starts]
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    return Calibration(torch.stack(windows), name_or_file, sha256, len(ids), len(before) > 0, len(after) > 0)


def _before(tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the ids of the tokens before and after a text as a model that predicts tokens sees it, int64 each."""
    return torch.tensor(ids_before(tokenizer), dtype=torch.int64), torch.empty(0, dtype=torch.int64)


def _around(tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the ids of the tokens that the tokenizer puts before and after a text, int64 each."""
    whole, bare = (tokenizer("a", add_special_tokens=special).input_ids for special in (True, False))
    start = next(place for place in range(len(whole)) if whole[place : place + len(bare)] == bare)
    before, after = whole[:start], whole[start + len(bare) :]
    return torch.tensor(before, dtype=torch.int64), torch.tensor(after, dtype=torch.int64)


def ids_before(tokenizer: Any) -> list[int]:
    """Returns the token ids that the tokenizer puts before a text by itself."""
    return [tokenizer.bos_token_id] if begins_with_bos(tokenizer) else []


def begins_with_bos(tokenizer: Any) -> bool:
    """Returns whether the tokenizer puts its beginning-of-sequence token before a text by itself."""
    ids = tokenizer("a").input_ids
    return len(ids) > 1 and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def ends_with_eos(tokenizer: Any) -> bool:
    """Returns whether the tokenizer puts its end-of-sequence token behind a text by itself."""
    ids = tokenizer("a").input_ids
    return len(ids) > 1 and tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id


def _window_starts(tokens: int, length: int, samples: int, seed: int) -> list[int]:
    """Returns the index of the first token of each of `samples` windows of `length` tokens.

    Windows are drawn in rounds. A round has all disjoint windows of the text in random order, at a random offset.
    """
    draw = torch.Generator().manual_seed(seed)
    starts: list[int] = []
    while len(starts) < samples:
        offset = int(torch.randint(tokens % length + 1, (), generator=draw))
        order = torch.randperm(tokens // length, generator=draw)
        starts += (offset + length * order).tolist()
    return starts[:samples]


def overlap(calibration: str, evaluation: str) -> float:
    """Returns the share of the evaluation text that the calibration text holds, 0 to 1.

    The evaluation text is cut into runs of `SHINGLE` characters. The share is that of the different runs that occur
    anywhere in the calibration text. White space of any length counts as one blank. The share is 0.0 if the evaluation
    text is shorter than one run.
    """
    calibration, evaluation = (" ".join(text.split()) for text in (calibration, evaluation))
    shingles = {evaluation[start : start + SHINGLE] for start in range(0, len(evaluation) - SHINGLE + 1, SHINGLE)}
    if not shingles:
        return 0.0
    shared: set[str] = set()
    for start in range(len(calibration) - SHINGLE + 1):
        if (shingle := calibration[start : start + SHINGLE]) in shingles:
            shared.add(shingle)
    return len(shared) / len(shingles)
