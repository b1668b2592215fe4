"""Reads a tokenizer's vocabulary for GGUF from tokenizer.json or tokenizer.model.

llama.cpp has four tokenizers that the models of the table use:

gpt2    byte-level BPE, which needs its merges and the name of its word splitter
llama   SentencePiece's BPE, which has no merges: it joins the two neighbours whose joined token has the highest score
t5      SentencePiece's unigram model (`unigram.py`)
bert    WordPiece (`wordpiece.py`)
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from gguf import TokenType

from lqexport.converters.gguf import unigram as gguf_unigram
from lqexport.converters.gguf import wordpiece as gguf_wordpiece
from lqexport.converters.gguf.added_tokens import AddedToken, added_tokens
from lqexport.converters.gguf.pretokenizers import pretokenizer_name
from lqexport.converters.gguf.sentencepiece_model import read_sentencepiece
from lqexport.converters.gguf.spaces import flat_steps, space_rules
from lqexport.converters.gguf.tokens import Token, Vocabulary, token_type_of, tokens_of, visible
from lqexport.errors import UserError
from lqexport.storage.files import optional_json


def read_vocabulary(folder: Path) -> Vocabulary:
    """Returns the vocabulary of a model folder.

    It is read from tokenizer.json if that holds byte-level BPE, else from tokenizer.model, else from tokenizer.json.
    Raises UserError if there is neither file, if one is damaged, or if llama.cpp has no such tokenizer.
    """
    tokenizer, options = (
        optional_json(folder / "tokenizer.json"),
        optional_json(folder / "tokenizer_config.json"),
    )
    if _is_byte_level(tokenizer):
        vocabulary = _byte_level(tokenizer, options)
    elif (folder / "tokenizer.model").is_file():
        vocabulary = _sentencepiece(folder / "tokenizer.model")
    elif tokenizer:
        vocabulary = _sentencepiece_like(tokenizer)
    else:
        raise UserError(f"{folder} has no tokenizer.json and no tokenizer.model, so there is no tokenizer to export.")
    return _with_added(vocabulary, added_tokens(folder, vocabulary))


def _is_byte_level(tokenizer: dict[str, Any]) -> bool:
    steps = [tokenizer.get("pre_tokenizer") or {}, tokenizer.get("decoder") or {}]
    step_types = {inner.get("type") for step in steps for inner in (step, *step.get("pretokenizers", ()))}
    return (tokenizer.get("model") or {}).get("type") == "BPE" and "ByteLevel" in step_types


def _byte_level(tokenizer: dict[str, Any], options: dict[str, Any]) -> Vocabulary:
    step_types = [str(step.get("type")) for step in flat_steps(tokenizer.get("normalizer"))]
    if changes := [step_type for step_type in step_types if step_type != "NFC"]:
        raise UserError(f"tokenizer.json changes text before splitting it ({', '.join(changes)}); llama.cpp does not.")
    for mark in ("continuing_subword_prefix", "end_of_word_suffix"):
        if tokenizer["model"].get(mark):
            raise UserError(f"tokenizer.json marks parts of words ({mark}), which llama.cpp does not.")
    pre = options.get("tokenizer.ggml.pre") or pretokenizer_name(tokenizer)
    tokens = {number: Token(text) for text, number in tokenizer["model"]["vocab"].items()}
    return Vocabulary("gpt2", str(pre), tokens, _merges(tokenizer))


def _merges(tokenizer: dict[str, Any]) -> list[str]:
    """Returns the merges as `left right`; tokenizer.json has them in this form or as pairs."""
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"].get("merges") or ()]


def _with_added(vocabulary: Vocabulary, added: Iterable[AddedToken]) -> Vocabulary:
    """Returns the vocabulary with the added tokens at their ids; special ones become control tokens."""
    tokens = dict(vocabulary.tokens)
    for token in added:
        known = tokens.get(token.number)
        kept = known is not None and known.token_type in (TokenType.UNKNOWN, TokenType.CONTROL)
        added_type = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
        text = token.text if vocabulary.model == "gpt2" else visible(token.text, added_type)
        token_type = known.token_type if known and kept else added_type
        tokens[token.number] = Token(text, token_type, known.score if known else -1000.0)
    return replace(vocabulary, tokens=tokens)


def _sentencepiece(path: Path) -> Vocabulary:
    model = read_sentencepiece(path)
    if not model.is_bpe:
        return gguf_unigram.from_sentencepiece(model)
    return Vocabulary("llama", "default", tokens_of(model.pieces), space_prefix=model.space_prefix)


def _sentencepiece_like(tokenizer: dict[str, Any]) -> Vocabulary:
    """Returns the vocabulary of a tokenizer.json that holds a SentencePiece model or WordPiece."""
    model = tokenizer.get("model") or {}
    if model.get("type") == "Unigram":
        return gguf_unigram.from_tokenizer_json(tokenizer)
    if model.get("type") == "WordPiece":
        return gguf_wordpiece.from_tokenizer_json(tokenizer)
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise UserError(
            f"tokenizer.json holds a tokenizer of type {model.get('type')!r} that llama.cpp does not have for this "
            "architecture; byte-level BPE, SentencePiece BPE with byte fallback, unigram models and WordPiece can be "
            "exported."
        )
    return _with_scores(tokenizer, model)


def _with_scores(tokenizer: dict[str, Any], model: dict[str, Any]) -> Vocabulary:
    """Returns the vocabulary of a SentencePiece BPE (Llama 2), which tokenizer.json stores as tokens and merges.

    tokenizer.json has no scores, but the merges are in the order of the scores. So a token's score here is minus the
    rank of the first merge that makes it.
    """
    ranks: dict[str, int] = {}
    merges = _merges(tokenizer)
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    added = {token["content"] for token in tokenizer.get("added_tokens") or ()}
    _check_merges(model["vocab"].keys() - added, set(merges))
    unknown = model.get("unk_token")
    tokens = {
        number: Token(text, token_type_of(text, unknown), -float(ranks.get(text, len(ranks))))
        for text, number in model["vocab"].items()
    }
    prefix, _ = space_rules(tokenizer, unigram=False)
    return Vocabulary("llama", "default", tokens, space_prefix=prefix)


def _check_merges(texts: Set[str], merges: Set[str]) -> None:
    """Raises UserError if more than 1 % of the pairs of tokens that form a third token are no merge.

    SentencePiece, and so llama.cpp, joins any two neighbours that form a token. (When transformers converts a
    tokenizer.model, it leaves out a few merges at most.)
    """
    pairs = [f"{text[:i]} {text[i:]}" for text in texts for i in range(1, len(text)) if {text[:i], text[i:]} <= texts]
    if sum(pair not in merges for pair in pairs) > len(pairs) / 100:
        raise UserError(
            "tokenizer.json holds a BPE with byte fallback that was not made from a SentencePiece model: not every two "
            "tokens that form a third are merged. llama.cpp has no such tokenizer for this architecture."
        )
