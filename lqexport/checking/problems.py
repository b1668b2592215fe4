"""The record of one problem of a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning"]


@dataclass(frozen=True)
class Problem:
    """One problem of a file.

    level      an error makes a file fail, a warning does not
    area       what is wrong: structure, values, tensors, shapes, settings, vocabulary, template, name, engine, source
    sentence   says what is wrong, and where
    unless_loaded   whether the error rests on a table of ours, so that it is a warning where llama.cpp loads the file
    """

    level: Level
    area: str
    sentence: str
    unless_loaded: bool = False


def error(area: str, sentence: str, *, unless_loaded: bool = False) -> Problem:
    """Returns a problem that makes a file fail."""
    return Problem("error", area, sentence, unless_loaded)


def warning(area: str, sentence: str) -> Problem:
    """Returns a problem that does not make a file fail."""
    return Problem("warning", area, sentence)
