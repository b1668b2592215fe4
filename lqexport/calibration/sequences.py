"""Token sequences to calibrate on, drawn from a text, and how much of a text is in another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lqexport.calibration.texts import Text, read_text
from lqexport.errors import UserError

__all__ = ["Calibration", "Text", "load_calibration", "overlap", "read_text"]

SHINGLE = 50


@dataclass(frozen=True)
class Calibration:
    """Sequences of tokens, and where they come from.

    tokens   int64 [samples, sequence_length]
    name     as the user gave it
    sha256   of the whole text
    text_tokens   tokens in the whole text
    bos      whether every sequence begins with the beginning-of-sequence token, an encoder's [CLS]
    separator   whether every sequence ends with an encoder's [SEP]
    """

    tokens: torch.Tensor
    name: str
    sha256: str
    text_tokens: int
    bos: bool
    separator: bool = False

    @property
    def repeats(self) -> bool:
        """Whether the text is too short for all sequences to be of different tokens."""
        samples, length = self.tokens.shape
        return samples > self.text_tokens // (length - self.bos - self.separator)

    def facts(self) -> dict[str, Any]:
        """What a report records of it."""
        samples, length = self.tokens.shape
        facts = {"name": self.name, "sha256": self.sha256, "text_tokens": self.text_tokens, "bos": self.bos}
        return facts | {"samples": samples, "sequence_length": length}


def load_calibration(
    name_or_file: str, tokenizer: Any, *, samples: int, sequence_length: int, seed: int
) -> Calibration:
    """Random windows of a text, as the model sees text when it runs.

    The text is tokenized once, without special tokens. A tokenizer that begins its output with a beginning-of-sequence
    token (Llama 2 and 3 do, SmolLM2 does not) has each window begin with it, followed by `sequence_length - 1` tokens
    of text; an encoder's, which puts a text between [CLS] and [SEP], has each window so, too; other models get windows
    of text alone. Windows do not overlap until the text is used up; only then are
    more drawn, at another offset. Equal arguments give equal tokens.

    Raises UserError where the text is unknown or holds fewer tokens than one window.
    """
    text = read_text(name_or_file)
    before, after = _special_tokens(tokenizer)
    ids = torch.tensor(tokenizer(text.content, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)
    length = sequence_length - len(before) - len(after)
    if len(ids) < length:
        raise UserError(
            f"The text {name_or_file} has {len(ids)} tokens, and a sequence of {sequence_length} needs {length}. "
            "Give a longer text or a smaller --sequence-length."
        )
    starts = _window_starts(len(ids), length, samples, seed)
    parts = [torch.cat([before, ids[start : start + length], after]) for start in starts]
    return Calibration(torch.stack(parts), name_or_file, text.sha256, len(ids), len(before) > 0, len(after) > 0)


def _special_tokens(tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What stands before and after a text that a model sees: ids int64 [0 or 1] each."""
    none = torch.empty(0, dtype=torch.int64)
    if begins_with_bos(tokenizer):
        return torch.tensor([tokenizer.bos_token_id]), none
    ids, first = tokenizer("a").input_ids, getattr(tokenizer, "cls_token_id", None)
    if first is None or ids[0] != first or ids[-1] != tokenizer.sep_token_id:
        return none, none
    return torch.tensor(ids[:1]), torch.tensor(ids[-1:])


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its beginning-of-sequence token before a text by itself."""
    ids = tokenizer("a").input_ids
    return len(ids) > 1 and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def _window_starts(tokens: int, length: int, samples: int, seed: int) -> list[int]:
    """First tokens of `samples` windows: rounds of disjoint windows in random order, each round at a random offset."""
    draw = torch.Generator().manual_seed(seed)
    starts: list[int] = []
    while len(starts) < samples:
        offset = int(torch.randint(tokens % length + 1, (), generator=draw))
        order = torch.randperm(tokens // length, generator=draw)
        starts += (offset + length * order).tolist()
    return starts[:samples]


def overlap(calibration: str, evaluation: str) -> float:
    """Share of the evaluation text, in different runs of 50 characters, that the calibration text holds anywhere.

    Runs of white space count as one blank. 0.0 for an evaluation text shorter than one run.
    """
    known, asked = (" ".join(text.split()) for text in (calibration, evaluation))
    shingles = {asked[start : start + SHINGLE] for start in range(0, len(asked) - SHINGLE + 1, SHINGLE)}
    if not shingles:
        return 0.0
    found: set[str] = set()
    for start in range(len(known) - SHINGLE + 1):
        if (piece := known[start : start + SHINGLE]) in shingles:
            found.add(piece)
    return len(found) / len(shingles)
