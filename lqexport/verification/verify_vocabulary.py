"""Compares the vocabulary of a GGUF file with the source's: texts, ids, special tokens, and what a text begins with."""

from __future__ import annotations

from typing import Any

from gguf import TokenType

from lqexport.calibration.sequences import begins_with_bos, ends_with_eos
from lqexport.converters.gguf.reader import GGUFModel
from lqexport.converters.gguf.tokenizer_json import adds, special_ids
from lqexport.converters.gguf.tokens import Token, Vocabulary
from lqexport.errors import well_formed
from lqexport.models.interface import Weights
from lqexport.models.source import GGUFSource, Source
from lqexport.models.source_view import folder_of, opened
from lqexport.models.tokenizers import vocabulary_faults

_PREFIX = "tokenizer.ggml."


def vocabulary_differences(file: Weights, source: Source) -> list[str]:
    """Returns sentences about how the tokenizer in a GGUF file differs from the source's; [] for other files.

    A .gguf source is compared key by key. Raises UserError if the file's metadata is malformed.
    """
    if not isinstance(file, GGUFModel) or not file.metadata.get(f"{_PREFIX}tokens"):
        return []
    with well_formed(f"The tokenizer in {file.path}"):
        if isinstance(of_source := opened(source), GGUFSource):
            return _different_keys(file.metadata, of_source.metadata)
        return _from_tokenizer(file.metadata, source)


def _different_keys(metadata: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    keys = [key for key in expected if key.startswith("tokenizer.") and metadata.get(key) != expected[key]]
    return [f"{key} is {_short(metadata.get(key))}, and the source has {_short(expected[key])}." for key in keys]


def _short(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else repr(value)[:60]


def _from_tokenizer(metadata: dict[str, Any], source: Source) -> list[str]:
    tokenizer, texts = source.tokenizer(), metadata[f"{_PREFIX}tokens"]
    types = metadata.get(f"{_PREFIX}token_type") or [int(TokenType.NORMAL)] * len(texts)
    tokens = {number: Token(text, TokenType(types[number])) for number, text in enumerate(texts)}
    vocabulary = Vocabulary(str(metadata[f"{_PREFIX}model"]), str(metadata.get(f"{_PREFIX}pre")), tokens)
    faults = vocabulary_faults(vocabulary, special_ids(metadata), tokenizer, folder_of(source), len(texts))
    if vocabulary.model != "bert":
        ours, theirs = adds(metadata), (begins_with_bos(tokenizer), ends_with_eos(tokenizer))
        ends = (("a", "BOS before"), ("an", "EOS behind"))
        for (article, end), added, expected in zip(ends, ours, theirs, strict=True):
            if added != expected:
                faults.append(
                    f"llama.cpp puts {article if added else 'no'} {end} a text, and the source's tokenizer "
                    f"{'none' if added else 'one'}."
                )
    return [f"Vocabulary: {fault}" for fault in faults]
