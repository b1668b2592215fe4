"""BERT's WordPiece as GGUF stores it: `tokenizer.ggml.model` is bert. Hugging Face marks the tokens that go on within a
word, llama.cpp those that begin one: `##ing` and `walk` are `ing` and `▁walk`.
"""

from __future__ import annotations

from typing import Any

from lqexport.converters.gguf.tokens import SPACE, Token, Vocabulary, text_kind
from lqexport.errors import UserError


def of_tokenizer_json(tokenizer: dict[str, Any]) -> Vocabulary:
    """From tokenizer.json. Raises UserError where llama.cpp would split otherwise: it always takes text in lower case,
    without accents, and each Chinese character as a word."""
    normalizer, model = tokenizer.get("normalizer") or {}, tokenizer["model"]
    stripped = normalizer.get("strip_accents") in (None, True)
    if not (normalizer.get("lowercase") and stripped and normalizer.get("handle_chinese_chars")):
        raise UserError("The tokenizer keeps case or accents of a text, which llama.cpp's WordPiece does not.")
    prefix, unknown = model.get("continuing_subword_prefix", "##"), model.get("unk_token")
    tokens = {
        number: Token(text.removeprefix(prefix) if text.startswith(prefix) else SPACE + text, text_kind(text, unknown))
        for text, number in model["vocab"].items()
    }
    return Vocabulary("bert", "default", tokens)
