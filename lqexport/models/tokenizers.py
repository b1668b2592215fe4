"""Opens the tokenizer of a written model, and compares a vocabulary with a tokenizer's."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from gguf import TokenType
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from lqexport.converters.gguf.added_tokens import ROLES, named_roles, named_special, named_texts
from lqexport.converters.gguf.tokens import SPACE, Token, Vocabulary
from lqexport.models.source import GGUFSource
from lqexport.models.tokenizer_files import load_tokenizer

_SPECIAL = (TokenType.CONTROL, TokenType.UNKNOWN)


def tokenizer_of(path: Path) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a .gguf file, a folder in Hugging Face layout, or an artifact.

    Raises UserError if it cannot be loaded.
    """
    if path.is_file():
        return GGUFSource(path).tokenizer()
    return load_tokenizer(path / "model" if (path / "run.json").is_file() else path)


class Splits:
    """How a source splits text: by transformers' tokenizer, or by its tokenizer.json alone.

    Classes of transformers change some tokenizers when they load them: that of Llama 2 puts no space before a text that
    begins with one, and its tokenizer.json does.

    folder   the source's folder; None if it has none
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, folder: Path | None) -> None:
        self.tokenizer = tokenizer
        self._path = folder / "tokenizer.json" if folder else None

    @functools.cached_property
    def _alone(self) -> Tokenizer | None:
        return Tokenizer.from_file(str(self._path)) if self._path and self._path.is_file() else None

    def agree(self, text: str, split: list[int]) -> bool:
        """Returns whether the source splits a text into these token ids, without tokens at the ends."""
        if split == self.tokenizer(text, add_special_tokens=False)["input_ids"]:
            return True
        return self._alone is not None and split == self._alone.encode(text, add_special_tokens=False).ids


def vocabulary_faults(
    vocabulary: Vocabulary, ids: Mapping[str, int], tokenizer: PreTrainedTokenizerBase, folder: Path | None, rows: int
) -> list[str]:
    """Returns sentences about how the vocabulary of a GGUF file differs from a tokenizer's, at most one of each sort.

    ids     role -> id of the special tokens in the file
    folder  the folder of the tokenizer's files; None if there is none
    rows    number of rows of the embedding; tokens beyond do not count

    Tokens that a class of transformers adds, and no file names, may be absent. Those that it makes special, such as
    Gemma's <mask>, and that the files do not call so, may be plain.
    """
    given = tokenizer.convert_ids_to_tokens(list(range(min(rows, len(tokenizer)))))
    theirs: list[str | None] = [*given, *[None] * (rows - len(given))]
    added = {number: token for number, token in tokenizer.added_tokens_decoder.items() if number < rows}
    named = named_texts(folder) if folder else set()
    unnamed = {number for number, token in added.items() if token.special and token.content not in named}
    absent = {number for number in unnamed if _is_filler(vocabulary.tokens.get(number))}
    texts = [n for n, text in enumerate(theirs) if n not in absent and not _same(vocabulary, n, text)]
    called_special = named_special(folder) if folder else set()
    special = [
        number
        for number, token in added.items()
        if token.special and token.content in called_special and number not in texts
        and vocabulary.tokens[number].token_type not in _SPECIAL
    ]  # fmt: skip
    faults = []
    if texts:
        number = texts[0]
        known = vocabulary.tokens.get(number)
        faults.append(
            f"{len(texts)} tokens have other texts than in the tokenizer, the first being {number}: "
            f"{known.text if known else None!r} instead of {theirs[number]!r}."
        )
    if special:
        faults.append(f"{len(special)} special tokens are plain ones, the first being {theirs[special[0]]!r}.")
    for role in named_roles(folder) if folder else ROLES:
        expected = getattr(tokenizer, f"{role}_token_id", None)
        if expected is not None and expected < rows and ids.get(role) != expected:
            faults.append(f"The {role} token is {ids.get(role)}, and the tokenizer's is {expected}.")
    return faults


def _same(vocabulary: Vocabulary, number: int, text: str | None) -> bool:
    """Returns whether a token has the tokenizer's text; fillers stand for ids that the tokenizer does not have."""
    if text is None or number not in vocabulary.tokens:
        return text is None and _is_filler(vocabulary.tokens.get(number))
    return vocabulary.source_text(number).replace(SPACE, " ") == text.replace(SPACE, " ")


def _is_filler(token: Token | None) -> bool:
    return token is None or token.token_type == TokenType.UNUSED
