"""Compares how a GGUF file splits text with how its source does: the word splitter and the merges, or a text itself."""

from __future__ import annotations

from typing import Any

from lqexport.calibration.texts import read_text
from lqexport.converters.gguf.pretokenizers import splitter_named
from lqexport.converters.gguf.reader import GGUFModel
from lqexport.converters.gguf.vocabulary import read_vocabulary
from lqexport.errors import UserError, well_formed
from lqexport.evaluation.conversations import token_texts
from lqexport.models.interface import Weights
from lqexport.models.source import Source
from lqexport.models.source_view import folder_of
from lqexport.models.tokenizers import Splits, tokenizer_of
from lqexport.verification.chat_templates import around

SPLIT_BY_SCORES = ("llama", "t5")
"""The tokenizers that have scores in the place of merges; files that other programs wrote have other ones."""
TEXT, LENGTH = "python-heldout", 4000
"""The text that is split to compare such tokenizers, and how many of its characters."""


def different_splits(file: Weights, source: Source) -> list[str]:
    """Returns sentences about how a GGUF file splits text otherwise than the source's tokenizer.json says.

    Nothing is said of other files, of other sources, and of a source whose tokenizer is not known to fit llama.cpp.
    """
    if not isinstance(file, GGUFModel) or (folder := folder_of(source)) is None:
        return []
    try:
        vocabulary = read_vocabulary(folder)
    except UserError:
        return []
    if vocabulary.model in SPLIT_BY_SCORES:
        return _other_tokens(file, source)
    if vocabulary.model != "gpt2":
        return []
    with well_formed(f"The tokenizer in {file.path}"):
        return _differences(file.metadata, vocabulary.pre, vocabulary.merges)


def _other_tokens(file: GGUFModel, source: Source) -> list[str]:
    """Returns a sentence if the tokenizer in a file splits a text otherwise than the source's; else []."""
    text, theirs = read_text(TEXT).content[:LENGTH], source.tokenizer()
    try:
        ours: list[int] = tokenizer_of(file.path)(text, add_special_tokens=False)["input_ids"]
    except UserError as error:
        return [str(error)]
    if Splits(theirs, folder_of(source)).agree(text, ours):
        return []
    expected = theirs(text, add_special_tokens=False)["input_ids"]
    shown = around(token_texts(theirs, expected), token_texts(theirs, ours))
    return [f"The file's tokenizer splits text otherwise than the source's: {shown[1]} in the place of {shown[0]}."]


def _differences(metadata: dict[str, Any], splitter: str, merges: list[str]) -> list[str]:
    given, differences, alike = metadata.get("tokenizer.ggml.pre"), [], splitter_named(splitter)
    if given != splitter and not (alike and given in alike.names):
        differences.append(
            f"tokenizer.ggml.pre is {given!r}, and the source's tokenizer splits words as {splitter!r} does."
        )
    ours = metadata.get("tokenizer.ggml.merges") or []
    if ours != merges:
        pairs = zip(ours, merges, strict=False)
        first = next((number for number, pair in enumerate(pairs) if pair[0] != pair[1]), min(len(ours), len(merges)))
        differences.append(
            f"The file has {len(ours)} merges, and the source's tokenizer {len(merges)}; they differ from number "
            f"{first} on."
        )
    return differences
