"""Checks the tokenizer in a file's metadata: tokens, types, merges, special ids, and the name of the word splitter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gguf import TokenType

from lqexport.checking.opened import OpenFile
from lqexport.checking.problems import Problem, error, warning
from lqexport.checking.splitter_names import SPLITTERS
from lqexport.errors import listed

MODELS = ("gpt2", "llama", "bert", "t5", "rwkv", "plamo2", "gemma4", "hybriddna", "whitespace", "none", "no_vocab")
"""The values of `tokenizer.ggml.model` that llama.cpp knows."""
PREFIX = "tokenizer.ggml."
BY_MERGES = ("gpt2", "gemma4")
WITHOUT_MERGES = ("kimi-k2",)
"""Splitters with which llama.cpp needs no merges."""
ENDS = ("eos", "eot", "eom")
"""The special tokens that end a text, of which at least one should be a control token."""


def check_vocabulary(file: OpenFile) -> Iterator[Problem]:
    """Yields the problems of the tokenizer. A file without one is an error, since llama.cpp does not load it."""
    model, tokens = file.metadata.get(f"{PREFIX}model"), file.strings(f"{PREFIX}tokens")
    if model is None:
        yield error("vocabulary", f"The file has no tokenizer ({PREFIX}model), so llama.cpp cannot load it.")
        return
    if model not in MODELS:
        yield error("vocabulary", f"{PREFIX}model is {model!r}, which llama.cpp does not know.", unless_loaded=True)
    if model in ("none", "no_vocab"):
        yield warning("vocabulary", "The file has no vocabulary: it runs on token ids alone.")
        return
    if not tokens:
        yield error("vocabulary", f"{PREFIX}tokens is missing, empty or not a list of texts.")
        return
    yield from _tokens(tokens)
    yield from _lists(file, len(tokens))
    yield from _bytes(str(model), tokens)
    if model in BY_MERGES:
        yield from _merges(file, set(tokens))
    if model == "gpt2":
        yield from _splitter(file.metadata.get(f"{PREFIX}pre"))
    yield from _special(file.metadata, len(tokens))


def _tokens(tokens: Sequence[str]) -> Iterator[Problem]:
    first: dict[str, int] = {}
    twice = [f"{text!r} ({first[text]} and {i})" for i, text in enumerate(tokens) if first.setdefault(text, i) != i]
    if empty := sum(not text for text in tokens):
        yield warning("vocabulary", f"{empty} tokens have no text.")
    if twice:
        yield error("vocabulary", f"{len(twice)} tokens have the text of another: {listed(twice, 3)}.")


def _lists(file: OpenFile, count: int) -> Iterator[Problem]:
    """Yields lists of another length than the tokens', and values in them that llama.cpp does not know."""
    for name in ("token_type", "scores"):
        values = file.metadata.get(f"{PREFIX}{name}")
        if values is not None and (not isinstance(values, list) or len(values) != count):
            number = len(values) if isinstance(values, list) else "no"
            yield error("vocabulary", f"{PREFIX}{name} has {number} values for {count} tokens.")
    types, scores = file.metadata.get(f"{PREFIX}token_type"), file.metadata.get(f"{PREFIX}scores")
    known = {int(member) for member in TokenType}
    if isinstance(types, list) and (wrong := [value for value in types if value not in known]):
        yield error("vocabulary", f"{len(wrong)} tokens have a type that does not exist, such as {wrong[0]}.")
    if types is None and file.metadata.get(f"{PREFIX}model") in ("llama", "t5", "gpt2"):
        yield warning("vocabulary", f"There is no {PREFIX}token_type: special tokens are taken as plain text.")
    if isinstance(scores, list) and not all(isinstance(score, int | float) and score == score for score in scores):
        yield error("vocabulary", f"{PREFIX}scores has values that are not numbers.")
    if scores is None and file.metadata.get(f"{PREFIX}model") in ("llama", "t5"):
        yield error("vocabulary", f"There is no {PREFIX}scores, without which text is split otherwise.")
    size = file.count("vocab_size")
    if size is not None and size != count:
        yield warning("vocabulary", f"{file.architecture}.vocab_size is {size}, and there are {count} tokens.")


def _bytes(model: str, tokens: Sequence[str]) -> Iterator[Problem]:
    """Yields the bytes of which a text cannot be built up, where the tokenizer must have all."""
    texts = set(tokens)
    if model == "llama" and (absent := [name for name in _byte_tokens() if name not in texts]):
        yield error("vocabulary", f"{len(absent)} of 256 tokens for single bytes are missing: {listed(absent, 3)}.")
    if model == "gpt2" and (absent := [letter for letter in _letters_of_bytes() if letter not in texts]):
        yield warning("vocabulary", f"{len(absent)} of 243 letters that stand for a byte of UTF-8 are no tokens.")


def _byte_tokens() -> list[str]:
    return [f"<0x{number:02X}>" for number in range(256)]


def _letters_of_bytes() -> list[str]:
    """Returns the letters by which byte-level BPE shows the bytes of UTF-8: printable ones themselves, others from
    U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [number for number in range(256) if number not in printable]
    shown = {number: chr(number) for number in printable} | {number: chr(0x100 + i) for i, number in enumerate(others)}
    never = {0xC0, 0xC1, *range(0xF5, 0x100)}
    return [letter for number, letter in shown.items() if number not in never]


def _merges(file: OpenFile, texts: set[str]) -> Iterator[Problem]:
    merges = file.strings(f"{PREFIX}merges")
    if merges is None:
        if file.metadata.get(f"{PREFIX}pre") not in WITHOUT_MERGES:
            yield error("vocabulary", f"There is no {PREFIX}merges, without which llama.cpp does not load the file.")
        return
    wrong = [merge for merge in merges if not _names_tokens(merge, texts)]
    if wrong:
        yield error("vocabulary", f"{len(wrong)} merges name tokens that do not exist: {listed(wrong, 3)}.")


def _names_tokens(merge: str, texts: set[str]) -> bool:
    """Returns whether both sides of a merge, and what it makes, are tokens. The first letter may itself be a space."""
    cut = merge.find(" ", 1)
    return cut > 0 and {merge[:cut], merge[cut + 1 :], merge[:cut] + merge[cut + 1 :]} <= texts


def _splitter(name: Any) -> Iterator[Problem]:
    if name is None:
        yield warning("vocabulary", f"There is no {PREFIX}pre: llama.cpp splits words by its default, often wrongly.")
    elif name not in SPLITTERS:
        sentence = f"{PREFIX}pre is {name!r}, which is not among llama.cpp's word splitters."
        yield error("vocabulary", sentence, unless_loaded=True)


def _special(metadata: Mapping[str, Any], count: int) -> Iterator[Problem]:
    ids = {key: value for key, value in metadata.items() if key.startswith(PREFIX) and key.endswith("_token_id")}
    wrong = {key: value for key, value in ids.items() if not isinstance(value, int) or not 0 <= value < count}
    for key, value in wrong.items():
        yield error("vocabulary", f"{key} is {value}, and there are {count} tokens.")
    if f"{PREFIX}eos_token_id" not in ids and metadata[f"{PREFIX}model"] in ("gpt2", "llama"):
        yield warning("vocabulary", f"There is no {PREFIX}eos_token_id: llama.cpp takes an id of its own.")
    types = metadata.get(f"{PREFIX}token_type")
    ends = [ids[key] for name in ENDS if (key := f"{PREFIX}{name}_token_id") in ids and key not in wrong]
    if ends and isinstance(types, list) and len(types) == count:
        plain = [number for number in ends if types[number] in (TokenType.NORMAL, TokenType.BYTE, TokenType.UNUSED)]
        if plain:
            yield warning("vocabulary", f"The token {plain[0]}, which ends a text, is not a control token.")
