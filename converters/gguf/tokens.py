"""Tokens by id, and what llama.cpp must know to split text into them."""

from __future__ import annotations

from dataclasses import dataclass, field

from gguf import TokenType

SPACE = "\u2581"  # SentencePiece's visible space


@dataclass(frozen=True)
class Token:
    text: str
    kind: TokenType = TokenType.NORMAL
    score: float = 0.0


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer.

    model          `tokenizer.ggml.model`: gpt2, llama, t5 or bert
    pre            `tokenizer.ggml.pre`, `default` where the tokenizer has no splitter
    merges         gpt2: pairs of tokens as `left right`, the first merged first
    space_prefix   whether a text gets a space before it
    merge_spaces   t5: whether runs of spaces become one, and none is left at the ends
    charsmap       t5: SentencePiece's precompiled replacements of characters
    """

    model: str
    pre: str
    tokens: dict[int, Token]
    merges: list[str] = field(default_factory=list)
    space_prefix: bool = False
    merge_spaces: bool = False
    charsmap: bytes = b""

    def id_of(self, text: str) -> int | None:
        """The id of a token by its text."""
        return next((number for number, token in self.tokens.items() if token.text == text), None)

    @property
    def unknown(self) -> int | None:
        """The id of the token for what no other token holds."""
        return next((number for number, token in self.tokens.items() if token.kind == TokenType.UNKNOWN), None)

    def padded(self, size: int) -> list[Token]:
        """Exactly `size` tokens, one per row of the embedding: gaps are filled, and added tokens beyond the last row,
        which the model cannot have learned, are left out."""
        return [self.tokens.get(i) or Token(f"[PAD{i}]", TokenType.UNUSED, -1000.0) for i in range(size)]


def visible(text: str, kind: int) -> str:
    """The text of a SentencePiece token: user-defined ones are looked for before spaces are made visible."""
    return text.replace(SPACE, " ") if kind == TokenType.USER_DEFINED else text


def text_kind(text: str, unknown: str | None) -> TokenType:
    """The kind of a token of tokenizer.json, which has only texts."""
    if text == unknown:
        return TokenType.UNKNOWN
    is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return TokenType.BYTE if is_byte else TokenType.NORMAL
