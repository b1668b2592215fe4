"""Compares the tokenizer of a GGUF file with the source's: vocabulary, special tokens, and llama.cpp's splits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lqexport.converters.gguf.tokenizer import special_ids
from lqexport.converters.gguf.tokenizer_json import is_splitter_known
from lqexport.converters.gguf.vocabulary import read_vocabulary
from lqexport.errors import UserError
from lqexport.evaluation.hard_texts import HARD, PLAIN
from lqexport.models.source import GGUFSource
from lqexport.models.tokenizers import Splits, vocabulary_faults

_MOST_TOKENS = 12
"""The most added tokens that stand in a text to compare."""


def check_kept(source: GGUFSource, rows: int) -> list[str]:
    """Returns a sentence if the tokenizer of a .gguf source is not known here.

    rows   number of rows of the embedding

    Raises UserError if it has another number of tokens.
    """
    count = len(source.metadata.get("tokenizer.ggml.tokens") or ())
    if count != rows:
        raise UserError(
            f"{source.path} has {count} tokens and {rows} rows of the embedding, and llama.cpp does not load a file "
            "made from it. Convert the model to GGUF again."
        )
    if is_splitter_known(source.metadata):
        return []
    return [
        f"The splitter {source.metadata.get('tokenizer.ggml.pre')!r} of {source.path} is not known here: calibration "
        "text is split as GPT-2's. The exported file keeps its name."
    ]


def check_vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase, rows: int) -> list[str]:
    """Returns a sentence if the model has no rows for some of the tokens that texts are split into.

    folder      the files from which a GGUF file gets its vocabulary
    tokenizer   what transformers loads
    rows        number of rows of the embedding

    Raises UserError if the vocabulary is not the tokenizer's, if its EOS has no row, or if llama.cpp has no such
    tokenizer.
    """
    vocabulary = read_vocabulary(folder)
    ids = special_ids(folder, vocabulary)
    if ids.get("eos", 0) >= rows:
        raise UserError(
            f"The token that ends a text, {tokenizer.eos_token!r}, has the id {ids['eos']}, and the embedding has "
            f"{rows} rows: the model cannot write it. Name another eos_token in tokenizer_config.json."
        )
    if faults := vocabulary_faults(vocabulary, ids, tokenizer, folder, rows):
        raise UserError(
            f"The GGUF file would have another vocabulary than the tokenizer that transformers loads. {faults[0]} "
            "Mend the tokenizer's files; saving the tokenizer again with transformers (save_pretrained) may do."
        )
    beyond = len(tokenizer) - rows
    if beyond <= 0:
        return []
    text = tokenizer.convert_ids_to_tokens(rows)
    return [
        f"{beyond} tokens of the tokenizer, from {text!r} on, are beyond the {rows} rows of the embedding. The file "
        "does not have them, and the model cannot run on them."
    ]


def texts_to_split(tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[str, ...]:
    """Returns plain and hard texts, without those that have tokens beyond the rows of the embedding."""
    return tuple(
        text
        for text in (*PLAIN, *HARD, *_with_tokens(tokenizer), *_overlapping(tokenizer))
        if max(tokenizer(text, add_special_tokens=False).input_ids, default=0) < rows
    )


def compare_splits(
    folder: Path, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], splits: Sequence[list[int]]
) -> list[str]:
    """Returns a sentence if llama.cpp splits hard texts otherwise than the tokenizer.

    splits   the token ids that llama.cpp makes of each text

    Raises UserError if it splits plain text otherwise.
    """
    expected, pairs = Splits(tokenizer, folder), zip(texts, splits, strict=True)
    different = {text: split for text, split in pairs if not expected.agree(text, split)}
    for text, split in different.items():
        if text in PLAIN:
            raise UserError(
                f"llama.cpp would split {text[:60]!r} into the tokens {split[:12]}, and the source's tokenizer makes "
                f"{tokenizer(text, add_special_tokens=False).input_ids[:12]} of it: llama.cpp does not have this "
                "tokenizer. Choose another target, such as exl2 or native."
            )
    if not different:
        return []
    first = next(iter(different))
    return [
        f"llama.cpp splits {len(different)} of {len(texts)} hard texts into other tokens than the source's tokenizer, "
        f"the first being {first[:60]!r}."
    ]


def _with_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns texts with added tokens in them, among them those that swallow spaces or stand alone."""
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.content]
    peculiar = [token for token in added if token.lstrip or token.rstrip or token.single_word]
    chosen = list(dict.fromkeys(token.content for token in (*peculiar[: _MOST_TOKENS // 2], *added)))[:_MOST_TOKENS]
    return [f"one{text}two {text} three\n{text}\n  four" for text in chosen]


def _overlapping(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns texts in which an added token ends with what another one begins with.

    transformers finds the token that begins first, and llama.cpp the longer one.
    """
    texts = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content]
    by_start = {text[:length]: text for text in texts for length in range(1, len(text))}
    pairs = (
        (text, start, by_start[start])
        for text in texts
        for start in (text[-length:] for length in range(1, len(text)))
        if start in by_start
    )
    return [f"one{text}{other.removeprefix(start)}two" for text, start, other in itertools.islice(pairs, _MOST_TOKENS)]
