"""A tokenizer's vocabulary as GGUF stores it, from tokenizer.json or tokenizer.model.

llama.cpp knows two tokenizers that the Llama family uses. `gpt2`: byte-level BPE, which needs its merges and the name
of its word splitter. `llama`: SentencePiece's BPE, which has no merges; of two neighbours that form a token it joins
those whose token has the highest score.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gguf import TokenType

from lqexport.converters.gguf_metadata import optional_json
from lqexport.converters.gguf_pretokenizers import pretokenizer_name
from lqexport.converters.sentencepiece_model import read_sentencepiece
from lqexport.errors import UserError

SPACE = "\u2581"  # SentencePiece's visible space


@dataclass(frozen=True)
class Token:
    text: str
    kind: TokenType = TokenType.NORMAL
    score: float = 0.0


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id and what splits text into them.

    model    `tokenizer.ggml.model`: gpt2 or llama
    pre      `tokenizer.ggml.pre`, `default` where the tokenizer has no splitter
    merges   pairs of tokens as `left right`, the first merged first
    space_prefix   whether a text gets a space before it
    """

    model: str
    pre: str
    tokens: dict[int, Token]
    merges: list[str] = field(default_factory=list)
    space_prefix: bool = False

    def id_of(self, text: str) -> int | None:
        """The id of a token by its text."""
        return next((number for number, token in self.tokens.items() if token.text == text), None)

    def padded(self, size: int) -> list[Token]:
        """Exactly `size` tokens, one per row of the embedding: gaps are filled, and added tokens beyond the last row,
        which the model cannot have learned, are left out."""
        return [self.tokens.get(i) or Token(f"[PAD{i}]", TokenType.UNUSED, -1000.0) for i in range(size)]


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
    normalizer = tokenizer.get("normalizer")
    if normalizer and normalizer.get("type") != "NFC":
        raise UserError(
            f"tokenizer.json changes text before splitting it ({normalizer.get('type')}); llama.cpp does not."
        )
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
        text = token["content"] if vocabulary.model == "gpt2" else _visible(token["content"], kind)
        tokens[token["id"]] = Token(text, known.kind if known and kept else kind, known.score if known else -1000.0)
    return replace(vocabulary, tokens=tokens)


def _visible(text: str, kind: int) -> str:
    """The text of a SentencePiece token: user-defined ones are looked for before spaces are made visible."""
    return text.replace(SPACE, " ") if kind == TokenType.USER_DEFINED else text


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
        raise UserError(f"{path} is a unigram model; llama.cpp has only SentencePiece BPE for this architecture.")
    tokens = {
        number: Token(_visible(piece.text, piece.kind), TokenType(piece.kind), piece.score)
        for number, piece in enumerate(model.pieces)
    }
    return Vocabulary("llama", "default", tokens, space_prefix=model.space_prefix)


def _sentencepiece_like(tokenizer: dict[str, Any]) -> Vocabulary:
    """A SentencePiece BPE as tokenizer.json holds it (Llama 2): merges and a vocabulary with visible spaces.

    Scores are not stored, but their order is that of the merges: a token's score is minus the rank of its first merge.
    """
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise UserError(
            f"tokenizer.json holds a tokenizer of type {model.get('type')!r} that llama.cpp does not have for this "
            "architecture; byte-level BPE and SentencePiece BPE with byte fallback can be exported."
        )
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(_merges(tokenizer)):
        ranks.setdefault(merge.replace(" ", ""), rank)
    unknown = model.get("unk_token")
    tokens = {
        number: Token(text, _text_kind(text, unknown), -float(ranks.get(text, len(ranks))))
        for text, number in model["vocab"].items()
    }
    return Vocabulary("llama", "default", tokens, space_prefix=_prefixes_space(tokenizer))


def _text_kind(text: str, unknown: str | None) -> TokenType:
    if text == unknown:
        return TokenType.UNKNOWN
    is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return TokenType.BYTE if is_byte else TokenType.NORMAL


def _prefixes_space(tokenizer: dict[str, Any]) -> bool:
    """Whether a normalizer or a pre-tokenizer puts a visible space before the text."""
    normalizer, splitter = tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer") or {}
    steps = [normalizer, *normalizer.get("normalizers", ()), splitter, *splitter.get("pretokenizers", ())]
    return any(
        step.get("type") == "Prepend"
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )
