"""Reads tokenizer.model, SentencePiece's file: a protobuf message (sentencepiece_model.proto).

Only the fields that an export needs are read, and no tokenizer runs:

    ModelProto      1 pieces (repeated), 2 trainer_spec, 3 normalizer_spec
    SentencePiece   1 piece (text), 2 score (float), 3 type (number)
    TrainerSpec     3 model_type (1 unigram, 2 BPE), 24 treat_whitespace_as_suffix (boolean, default false)
    NormalizerSpec  2 precompiled_charsmap (bytes), 3 add_dummy_prefix, 4 remove_extra_whitespaces (booleans, default
                    true)
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lqexport.errors import MALFORMED, UserError

BPE = 2
NORMAL = 1


@dataclass(frozen=True)
class Piece:
    """One token of a SentencePiece model.

    token_type   1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte; GGUF has the same numbers
    """

    text: str
    score: float
    token_type: int


@dataclass(frozen=True)
class SentencePieceModel:
    """The content of a tokenizer.model.

    space_prefix   whether a text gets a space before it (add_dummy_prefix)
    space_suffix   whether that space goes behind the text instead (treat_whitespace_as_suffix)
    merge_spaces   whether runs of spaces become one (remove_extra_whitespaces)
    charsmap       precompiled_charsmap
    """

    pieces: list[Piece]
    is_bpe: bool
    space_prefix: bool
    space_suffix: bool
    merge_spaces: bool
    charsmap: bytes


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Returns the content of a tokenizer.model. Raises UserError if it is damaged or no SentencePiece model."""
    try:
        message = list(_fields(path.read_bytes()))
        pieces = [_piece(value) for number, value in message if number == 1]
        trainer, normalizer = (_message(message, number) for number in (2, 3))
        charsmap = _bytes(normalizer.get(2, b""))
    except (OSError, *MALFORMED, struct.error) as error:
        raise UserError(f"{path} is not a SentencePiece model, or it is damaged ({error}).") from error
    if not pieces:
        raise UserError(f"{path} is not a SentencePiece model: it holds no pieces.")
    prefix, suffix, merged = bool(normalizer.get(3, 1)), bool(trainer.get(24, 0)), bool(normalizer.get(4, 1))
    return SentencePieceModel(pieces, trainer.get(3) == BPE, prefix, suffix, merged, charsmap)


def _piece(content: int | bytes) -> Piece:
    fields = dict(_fields(_bytes(content)))
    (score,) = struct.unpack("<f", _bytes(fields.get(2, bytes(4))))
    return Piece(_bytes(fields[1]).decode(), score, int(fields.get(3, NORMAL)))


def _message(message: list[tuple[int, int | bytes]], number: int) -> dict[int, int | bytes]:
    """Returns the fields of the sub-message with this number, or {} if it is absent."""
    return next((dict(_fields(_bytes(value))) for key, value in message if key == number), {})


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a field has another type than SentencePiece gives it")
    return value


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields (field number, value) for each field of a protobuf message; a value is a number (varint) or bytes."""
    position = 0
    while position < len(content):
        key, position = _varint(content, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, position = _varint(content, position)
            yield number, value
            continue
        if wire_type == 2:
            size, position = _varint(content, position)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"unknown field at byte {position}")
        if position + size > len(content):
            raise ValueError("it ends too early")
        yield number, content[position : position + size]
        position += size


def _varint(content: bytes, position: int) -> tuple[int, int]:
    """Returns a varint (groups of seven bits, the lowest first) and the position behind it."""
    value = shift = 0
    while True:
        if shift > 63:
            raise ValueError(f"a number of more than 64 bits at byte {position}")
        byte = content[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
