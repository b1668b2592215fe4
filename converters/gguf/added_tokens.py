"""Lists the added tokens of a tokenizer, which four files of a model folder can name.

transformers adds the tokens of all of these, in this order, and gives those without an id the next free ids:

    tokenizer.json          added_tokens, with ids
    tokenizer_config.json   added_tokens_decoder, with ids
    added_tokens.json       with ids
    special_tokens_map.json, tokenizer_config.json   special tokens by their role, and others without a role
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lqexport.converters.gguf.tokens import Vocabulary
from lqexport.storage.files import optional_json

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_WITHOUT_ROLE = ("extra_special_tokens", "additional_special_tokens")


@dataclass(frozen=True)
class AddedToken:
    """A token that is looked for in a text before it is split.

    special   whether it has a meaning of its own, and is not a part of the text
    """

    number: int
    text: str
    special: bool


def added_tokens(folder: Path, vocabulary: Vocabulary) -> list[AddedToken]:
    """Returns the added tokens of a model folder, each text once.

    vocabulary   the tokens without the added ones; an added token with the text of one of them has its id
    """
    numbers = {vocabulary.source_text(number): number for number in vocabulary.tokens}
    added: dict[str, AddedToken] = {}
    for token in _with_ids(folder):
        known = added.get(token.text)
        if known is None:
            added[token.text] = replace(token, number=numbers.get(token.text, token.number))
        else:
            added[token.text] = replace(known, special=token.special)
    last = max([*numbers.values(), *(token.number for token in added.values())], default=-1)
    for text in special_texts(folder):
        if text not in added:
            number = numbers.get(text, last + 1)
            added[text] = AddedToken(number, text, special=True)
            last = max(last, number)
    return list(added.values())


def _with_ids(folder: Path) -> Iterator[AddedToken]:
    """Yields the added tokens that have ids, as each file names them."""
    tokenizer, options = optional_json(folder / "tokenizer.json"), optional_json(folder / "tokenizer_config.json")
    for token in tokenizer.get("added_tokens") or ():
        yield AddedToken(token["id"], token["content"], bool(token.get("special")))
    decoder = options.get("added_tokens_decoder") or {}
    for number, token in sorted((int(number), token) for number, token in decoder.items()):
        yield AddedToken(number, token["content"], bool(token.get("special")))
    listed = {token["content"] for token in (*(tokenizer.get("added_tokens") or ()), *decoder.values())}
    for text, number in optional_json(folder / "added_tokens.json").items():
        if text not in listed:  # this file does not say what is special
            yield AddedToken(number, text, special=False)


def named_roles(folder: Path) -> list[str]:
    """Returns the roles for which the tokenizer's files name a token."""
    files = [optional_json(folder / name) for name in _FILES]
    return [role for role in ROLES if any(text_of(file.get(f"{role}_token")) for file in files)]


def named_texts(folder: Path) -> set[str]:
    """Returns the texts of all added tokens that the tokenizer's files name. A class of transformers may add others."""
    return {token.text for token in _with_ids(folder)} | set(special_texts(folder))


def named_special(folder: Path) -> set[str]:
    """Returns those of `named_texts` that the files call special. A class of transformers may make others special."""
    return {token.text for token in _with_ids(folder) if token.special} | set(special_texts(folder))


def special_texts(folder: Path) -> list[str]:
    """Returns the texts of the special tokens that the tokenizer's files name, each once: by role, then the others."""
    files = [optional_json(folder / name) for name in _FILES]
    by_role = [text_of(file.get(f"{role}_token")) for role in ROLES for file in files]
    others = [text_of(token) for file in files for key in _WITHOUT_ROLE for token in _listed(file.get(key))]
    others += [text_of(file[key]) for file in files for key in file if re.fullmatch(r"\w+_token", key)]
    return list(dict.fromkeys(text for text in (*by_role, *others) if text))


def _listed(tokens: Any) -> list[Any]:
    return list(tokens.values()) if isinstance(tokens, dict) else list(tokens or ())


def text_of(token: Any) -> str | None:
    """Returns the text of a token of the tokenizer's files: a text, or an object with the text as `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
