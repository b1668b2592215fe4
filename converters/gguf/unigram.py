"""SentencePiece's unigram model as GGUF stores it: `tokenizer.ggml.model` is t5, whatever the model's architecture.

Of all ways to cut a text into tokens, the one of the highest sum of scores counts. Unlike SentencePiece, llama.cpp has
no bytes for the characters that no token holds: they become the unknown token.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

from gguf import TokenType

from lqexport.converters.gguf.sentencepiece_model import SentencePieceModel
from lqexport.converters.gguf.spaces import flat_steps, space_rules
from lqexport.converters.gguf.tokens import Token, Vocabulary, text_kind, visible
from lqexport.errors import UserError


def of_sentencepiece(model: SentencePieceModel) -> Vocabulary:
    """From tokenizer.model. Raises UserError where llama.cpp would split otherwise."""
    if model.space_suffix or model.merge_spaces > model.space_prefix:
        raise UserError("tokenizer.model puts spaces where llama.cpp's unigram tokenizer does not.")
    tokens = {
        number: Token(visible(piece.text, piece.kind), TokenType(piece.kind), piece.score)
        for number, piece in enumerate(model.pieces)
    }
    return _checked(Vocabulary("t5", "default", tokens, [], model.space_prefix, model.merge_spaces, model.charsmap))


def of_tokenizer_json(tokenizer: dict[str, Any]) -> Vocabulary:
    """From tokenizer.json. Raises UserError where llama.cpp would split otherwise."""
    model = tokenizer["model"]
    vocabulary, unknown = model["vocab"], model.get("unk_id")
    name = vocabulary[unknown][0] if unknown is not None else None
    tokens = {number: Token(text, text_kind(text, name), score) for number, (text, score) in enumerate(vocabulary)}
    prefix, merged = space_rules(tokenizer, unigram=True)
    return _checked(Vocabulary("t5", "default", tokens, [], prefix, merged, _charsmap(tokenizer.get("normalizer"))))


def _checked(vocabulary: Vocabulary) -> Vocabulary:
    if any(token.kind == TokenType.BYTE for token in vocabulary.tokens.values()):
        raise UserError("The tokenizer is a unigram model with tokens for bytes, which llama.cpp does not use for one.")
    if vocabulary.unknown is None:
        raise UserError("The tokenizer is a unigram model without an unknown token, which llama.cpp needs for one.")
    return vocabulary


def _charsmap(normalizer: dict[str, Any] | None) -> bytes:
    """SentencePiece's precompiled replacements, empty where there are none."""
    maps = [step["precompiled_charsmap"] for step in flat_steps(normalizer) if step.get("type") == "Precompiled"]
    try:
        return base64.b64decode(maps[0], validate=True) if maps else b""
    except binascii.Error as error:
        raise UserError(f"tokenizer.json is damaged: its precompiled_charsmap is not base64 ({error}).") from error
