"""The record of a tokenizer's tokens, and of what llama.cpp needs to split text into them."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from gguf import TokenType

from lqexport.converters.gguf.sentencepiece_model import Piece
from lqexport.errors import UserError

SPACE = "\u2581"  # SentencePiece's visible space


@dataclass(frozen=True)
class Token:
    """One token: its text, its type, and its score in a SentencePiece model."""

    text: str
    token_type: TokenType = TokenType.NORMAL
    score: float = 0.0


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as GGUF stores it.

    model          `tokenizer.ggml.model`: gpt2, llama, t5 or bert
    pre            `tokenizer.ggml.pre`; `default` for a tokenizer without a word splitter
    tokens         token id -> token
    merges         gpt2: pairs of tokens as `left right`, in the order of their priority
    space_prefix   whether a text gets a space before it
    merge_spaces   t5: whether runs of spaces become one, and spaces at the ends of a text are removed
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
        """Returns the id of the token with this text, or None."""
        return next((number for number, token in self.tokens.items() if token.text == text), None)

    def source_text(self, number: int) -> str:
        """Returns the text that the tokenizer's own files have for a token.

        Their WordPiece marks tokens that continue a word; a SentencePiece model has visible spaces.
        """
        token = self.tokens[number]
        if self.model == "bert" and token.token_type == TokenType.NORMAL:
            return token.text[1:] if token.text.startswith(SPACE) else f"##{token.text}"
        return token.text

    @property
    def unknown(self) -> int | None:
        """The id of the unknown token, which stands for what no other token holds; None where there is none."""
        return next((number for number, token in self.tokens.items() if token.token_type == TokenType.UNKNOWN), None)

    def padded(self, size: int) -> list[Token]:
        """Returns exactly `size` tokens, one per row of the embedding.

        Ids without a token get a filler. Tokens beyond the last row, which the model cannot have learned, are left out.
        Raises UserError if two tokens have the same text, since llama.cpp does not load such a file.
        """
        numbers: dict[str, int] = {}
        for number, token in self.tokens.items():
            if number < size and numbers.setdefault(token.text, number) != number:
                raise UserError(
                    f"The tokens {numbers[token.text]} and {number} have the same text {token.text!r}, and llama.cpp "
                    "loads no such vocabulary. Name each token once in the tokenizer's files."
                )
        return [self.tokens.get(i) or Token(_filler(i, numbers), TokenType.UNUSED, -1000.0) for i in range(size)]


def _filler(number: int, texts: Container[str]) -> str:
    """Returns a text for an id without a token, other than all `texts`."""
    text = f"[PAD{number}]"
    while text in texts:
        text += "_"
    return text


def visible(text: str, token_type: int) -> str:
    """Returns the text of a SentencePiece token as llama.cpp looks for it.

    llama.cpp looks for user-defined tokens before it makes spaces visible, so these have plain spaces.
    """
    return text.replace(SPACE, " ") if token_type == TokenType.USER_DEFINED else text


def tokens_of(pieces: Iterable[Piece]) -> dict[int, Token]:
    """Returns token id -> token for the pieces of a SentencePiece model."""
    return {
        number: Token(visible(piece.text, piece.token_type), TokenType(piece.token_type), piece.score)
        for number, piece in enumerate(pieces)
    }


def token_type_of(text: str, unknown: str | None) -> TokenType:
    """Returns the type of a token by its text, since tokenizer.json does not give types.

    unknown   text of the unknown token
    """
    if text == unknown:
        return TokenType.UNKNOWN
    is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return TokenType.BYTE if is_byte else TokenType.NORMAL
