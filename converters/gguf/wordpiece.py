"""Reads BERT's WordPiece for GGUF, where `tokenizer.ggml.model` is bert.

Hugging Face marks tokens that continue a word; llama.cpp marks tokens that begin one. So `##ing` and `walk` become
`ing` and `▁walk`.
"""

from __future__ import annotations

from typing import Any

from lqexport.converters.gguf.tokens import SPACE, Token, Vocabulary, token_type_of
from lqexport.errors import UserError


def from_tokenizer_json(tokenizer: dict[str, Any]) -> Vocabulary:
    """Returns the vocabulary of a tokenizer.json. Raises UserError if llama.cpp would split text in another way.

    llama.cpp always makes text lower case, removes accents, and takes each Chinese character as a word.
    """
    normalizer, model = tokenizer.get("normalizer") or {}, tokenizer["model"]
    stripped = normalizer.get("strip_accents") in (None, True)
    if not (normalizer.get("lowercase") and stripped and normalizer.get("handle_chinese_chars")):
        raise UserError("The tokenizer keeps case or accents of a text, which llama.cpp's WordPiece does not.")
    prefix, unknown = model.get("continuing_subword_prefix", "##"), model.get("unk_token")
    tokens = {
        number: Token(
            text.removeprefix(prefix) if text.startswith(prefix) else SPACE + text, token_type_of(text, unknown)
        )
        for text, number in model["vocab"].items()
    }
    return Vocabulary("bert", "default", tokens)
