"""Checks, before any work, that the GGUF file of a run can hold the source's tokenizer.

The files that the artifact would hold are written to a temporary folder, and their vocabulary is compared with the
tokenizer that transformers loads. Where llama.cpp is installed, it splits hard texts with that vocabulary.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lqexport.converters.gguf.metadata import model_name
from lqexport.converters.gguf.tokenizer import name_for_llamacpp, special_ids, write_vocabulary
from lqexport.converters.gguf.tokenizer_json import is_splitter_known
from lqexport.converters.gguf.vocabulary import read_vocabulary
from lqexport.errors import UserError
from lqexport.evaluation.hard_texts import HARD, PLAIN
from lqexport.evaluation.llamacpp_process import LlamaCppFailed
from lqexport.evaluation.splitting import llamacpp_splits
from lqexport.models.source import GGUFSource, HuggingFaceSource, Source
from lqexport.models.tokenizers import Splits, vocabulary_faults

_MOST_TOKENS = 12
"""The most added tokens that stand in a text to compare."""


def check_tokenizer(source: Source, rows: int) -> list[str]:
    """Returns sentences about what the GGUF file of `source` will do otherwise than the source's tokenizer.

    rows   number of rows of the embedding

    Raises UserError if the file cannot hold the tokenizer: if llama.cpp has no such tokenizer, if texts or ids of
    tokens are not those that transformers loads, or if llama.cpp splits plain text into other tokens.
    """
    if isinstance(source, GGUFSource):
        return _of_gguf(source, rows)
    if isinstance(source, HuggingFaceSource) and not source.has_tokenizer():
        return [f"{source.name} has no tokenizer, and a GGUF file needs one: put its files there, or into OUT/model."]
    tokenizer = source.tokenizer()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source.copy_model_files(folder)
        _check_vocabulary(folder, tokenizer, rows)
        name = name_for_llamacpp(model_name({"recipe": {"source": source.name}}), folder)
        write_vocabulary(folder, folder / "vocabulary.gguf", rows, name)
        return [*_without_rows(tokenizer, rows), *_split_otherwise(folder, tokenizer, rows)]


def _of_gguf(source: GGUFSource, rows: int) -> list[str]:
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


def _check_vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Raises UserError if the vocabulary of a model folder is not the tokenizer's, or if its EOS has no row."""
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


def _without_rows(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[str]:
    """Returns a sentence if the model has no rows for some of the tokens that texts are split into."""
    beyond = len(tokenizer) - rows
    if beyond <= 0:
        return []
    text = tokenizer.convert_ids_to_tokens(rows)
    return [
        f"{beyond} tokens of the tokenizer, from {text!r} on, are beyond the {rows} rows of the embedding. The file "
        "does not have them, and the model cannot run on them."
    ]


def _split_otherwise(folder: Path, tokenizer: PreTrainedTokenizerBase, rows: int) -> list[str]:
    """Returns a sentence if llama.cpp splits hard texts otherwise than the tokenizer; none if it is not installed.

    Texts with tokens beyond the rows of the embedding are left out. Raises UserError if llama.cpp does not load the
    vocabulary, or splits plain text otherwise.
    """
    texts = tuple(
        text
        for text in (*PLAIN, *HARD, *_with_tokens(tokenizer), *_overlapping(tokenizer))
        if max(tokenizer(text, add_special_tokens=False).input_ids, default=0) < rows
    )
    try:
        splits = llamacpp_splits((folder / "vocabulary.gguf").read_bytes(), texts)
    except LlamaCppFailed as failure:
        raise UserError(f"llama.cpp does not load the vocabulary of the GGUF file: {failure}") from failure
    except UserError:  # it is not installed
        return []
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
