"""A tokenizer's vocabulary as GGUF stores it, from tokenizer.json or tokenizer.model.

llama.cpp knows four tokenizers that models of the table use. `gpt2`: byte-level BPE, which needs its merges and the
name of its word splitter. `llama`: SentencePiece's BPE, which has no merges; of two neighbours that form a token it
joins those whose token has the highest score. `t5`: SentencePiece's unigram model (`gguf_unigram`). `bert`: WordPiece
(`gguf_wordpiece`).
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from gguf import TokenType

from lqexport.converters.gguf import unigram as gguf_unigram
from lqexport.converters.gguf import wordpiece as gguf_wordpiece
from lqexport.converters.gguf.metadata import optional_json
from lqexport.converters.gguf.pretokenizers import pretokenizer_name
from lqexport.converters.gguf.sentencepiece_model import read_sentencepiece
from lqexport.converters.gguf.spaces import flat_steps, space_rules
from lqexport.converters.gguf.tokens import Token, Vocabulary, text_kind, visible
from lqexport.errors import UserError


def read_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary of a model folder: tokenizer.json if it is byte-level BPE, else tokenizer.model if there is one.

    Raises UserError where there is neither, one is damaged, or llama.cpp has no such tokenizer.
    """
    tokenizer, options = (
        optional_json(folder / "tokenizer.json"),
        optional_json(folder / "tokenizer_config.json"),
    )
    if _is_byte_level(tokenizer):
        return _byte_level(tokenizer, options)
    if (folder / "tokenizer.model").is_file():
        vocabulary = _sentencepiece(folder / "tokenizer.model")
    elif tokenizer:
        vocabulary = _sentencepiece_like(tokenizer)
    else:
        raise UserError(f"{folder} has no tokenizer.json and no tokenizer.model, so there is no tokenizer to export.")
    return _with_added(vocabulary, _added_tokens(folder, tokenizer, options))


def _is_byte_level(tokenizer: dict[str, Any]) -> bool:
    steps = [tokenizer.get("pre_tokenizer") or {}, tokenizer.get("decoder") or {}]
    kinds = {part.get("type") for step in steps for part in (step, *step.get("pretokenizers", ()))}
    return (tokenizer.get("model") or {}).get("type") == "BPE" and "ByteLevel" in kinds


def _byte_level(tokenizer: dict[str, Any], options: dict[str, Any]) -> Vocabulary:
    kinds = [str(step.get("type")) for step in flat_steps(tokenizer.get("normalizer"))]
    if changes := [kind for kind in kinds if kind != "NFC"]:
        raise UserError(f"tokenizer.json changes text before splitting it ({', '.join(changes)}); llama.cpp does not.")
    pre = options.get("tokenizer.ggml.pre") or pretokenizer_name(tokenizer)
    tokens = {number: Token(text) for text, number in tokenizer["model"]["vocab"].items()}
    vocabulary = Vocabulary("gpt2", str(pre), tokens, _merges(tokenizer))
    return _with_added(vocabulary, tokenizer.get("added_tokens") or ())


def _merges(tokenizer: dict[str, Any]) -> list[str]:
    """Merges as `left right`; tokenizer.json writes them so, or as pairs."""
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"].get("merges") or ()]


def _with_added(vocabulary: Vocabulary, added: Iterable[dict[str, Any]]) -> Vocabulary:
    """Added tokens take their ids; special ones become control tokens."""
    tokens = dict(vocabulary.tokens)
    for token in added:
        known = tokens.get(token["id"])
        kept = known is not None and known.kind in (TokenType.UNKNOWN, TokenType.CONTROL)
        kind = TokenType.CONTROL if token.get("special") else TokenType.USER_DEFINED
        text = token["content"] if vocabulary.model == "gpt2" else visible(token["content"], kind)
        tokens[token["id"]] = Token(text, known.kind if known and kept else kind, known.score if known else -1000.0)
    return replace(vocabulary, tokens=tokens)


def _added_tokens(folder: Path, tokenizer: dict[str, Any], options: dict[str, Any]) -> list[dict[str, Any]]:
    """Added tokens with id, content and special, from the first file that lists them."""
    if tokenizer.get("added_tokens"):
        return list(tokenizer["added_tokens"])
    if decoder := options.get("added_tokens_decoder"):
        return [{"id": int(number), **token} for number, token in decoder.items()]
    return [{"id": number, "content": text} for text, number in optional_json(folder / "added_tokens.json").items()]


def _sentencepiece(path: Path) -> Vocabulary:
    model = read_sentencepiece(path)
    if not model.is_bpe:
        return gguf_unigram.of_sentencepiece(model)
    tokens = {
        number: Token(visible(piece.text, piece.kind), TokenType(piece.kind), piece.score)
        for number, piece in enumerate(model.pieces)
    }
    return Vocabulary("llama", "default", tokens, space_prefix=model.space_prefix)


def _sentencepiece_like(tokenizer: dict[str, Any]) -> Vocabulary:
    """A SentencePiece model, or WordPiece, as tokenizer.json holds it."""
    model = tokenizer.get("model") or {}
    if model.get("type") == "Unigram":
        return gguf_unigram.of_tokenizer_json(tokenizer)
    if model.get("type") == "WordPiece":
        return gguf_wordpiece.of_tokenizer_json(tokenizer)
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise UserError(
            f"tokenizer.json holds a tokenizer of type {model.get('type')!r} that llama.cpp does not have for this "
            "architecture; byte-level BPE, SentencePiece BPE with byte fallback, unigram models and WordPiece can be "
            "exported."
        )
    return _with_scores(tokenizer, model)


def _with_scores(tokenizer: dict[str, Any], model: dict[str, Any]) -> Vocabulary:
    """A SentencePiece BPE (Llama 2): merges and a vocabulary with visible spaces.

    Scores are not stored, but their order is that of the merges: a token's score is minus the rank of its first merge.
    """
    ranks: dict[str, int] = {}
    merges = _merges(tokenizer)
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    added = {token["content"] for token in tokenizer.get("added_tokens") or ()}
    _check_merges(model["vocab"].keys() - added, set(merges))
    unknown = model.get("unk_token")
    tokens = {
        number: Token(text, text_kind(text, unknown), -float(ranks.get(text, len(ranks))))
        for text, number in model["vocab"].items()
    }
    prefix, _ = space_rules(tokenizer, unigram=False)
    return Vocabulary("llama", "default", tokens, space_prefix=prefix)


def _check_merges(texts: Set[str], merges: Set[str]) -> None:
    """Raises UserError where neighbours that form a token are often no merge: SentencePiece, and so llama.cpp, joins
    any such. (What transformers makes of a tokenizer.model leaves out a few at most.)"""
    pairs = [f"{text[:i]} {text[i:]}" for text in texts for i in range(1, len(text)) if {text[:i], text[i:]} <= texts]
    if sum(pair not in merges for pair in pairs) > len(pairs) / 100:
        raise UserError(
            "tokenizer.json holds a BPE with byte fallback that was not made from a SentencePiece model: not every two "
            "tokens that form a third are merged. llama.cpp has no such tokenizer for this architecture."
        )
