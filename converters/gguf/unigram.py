"""Reads SentencePiece's unigram models for GGUF, where `tokenizer.ggml.model` is t5 for every architecture.

A unigram model cuts a text into the tokens with the highest sum of scores. Characters that no token holds become the
unknown token in llama.cpp; SentencePiece can make them bytes.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

from gguf import TokenType

from lqexport.converters.gguf.sentencepiece_model import SentencePieceModel
from lqexport.converters.gguf.spaces import flat_steps, space_rules
from lqexport.converters.gguf.tokens import Token, Vocabulary, token_type_of, tokens_of
from lqexport.errors import UserError


def from_sentencepiece(model: SentencePieceModel) -> Vocabulary:
    """Returns the vocabulary of a tokenizer.model. Raises UserError if llama.cpp would split text in another way."""
    if model.space_suffix or model.merge_spaces > model.space_prefix:
        raise UserError("tokenizer.model puts spaces where llama.cpp's unigram tokenizer does not.")
    tokens, prefix = tokens_of(model.pieces), model.space_prefix
    return _checked(Vocabulary("t5", "default", tokens, [], prefix, model.merge_spaces, model.charsmap))


def from_tokenizer_json(tokenizer: dict[str, Any]) -> Vocabulary:
    """Returns the vocabulary of a tokenizer.json. Raises UserError if llama.cpp would split text in another way."""
    model = tokenizer["model"]
    pieces, unknown_id = model["vocab"], model.get("unk_id")
    unknown = pieces[unknown_id][0] if unknown_id is not None else None
    tokens = {number: Token(text, token_type_of(text, unknown), score) for number, (text, score) in enumerate(pieces)}
    prefix, merged = space_rules(tokenizer, unigram=True)
    return _checked(Vocabulary("t5", "default", tokens, [], prefix, merged, _charsmap(tokenizer.get("normalizer"))))


def _checked(vocabulary: Vocabulary) -> Vocabulary:
    if any(token.token_type == TokenType.BYTE for token in vocabulary.tokens.values()):
        raise UserError("The tokenizer is a unigram model with tokens for bytes, which llama.cpp does not use for one.")
    if vocabulary.unknown is None:
        raise UserError("The tokenizer is a unigram model without an unknown token, which llama.cpp needs for one.")
    return vocabulary


def _charsmap(normalizer: dict[str, Any] | None) -> bytes:
    """Returns SentencePiece's precompiled replacements, or no bytes if there are none."""
    maps = [step["precompiled_charsmap"] for step in flat_steps(normalizer) if step.get("type") == "Precompiled"]
    try:
        return base64.b64decode(maps[0], validate=True) if maps else b""
    except binascii.Error as error:
        raise UserError(f"tokenizer.json is damaged: its precompiled_charsmap is not base64 ({error}).") from error
