"""UserError, the only error that users see: a sentence that says what is wrong, where, and what to do."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

LONGEST = 1500
"""The most characters of a message that are shown. Parts of it may come from a file and be of any length."""
MALFORMED = (
    ArithmeticError, AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError,
)  # fmt: skip
"""The exceptions that code raises when it reads a file whose content does not have the expected form."""

ANEW = "Copy the artifact again, or quantize again into another folder."
"""Advice if a finished artifact is damaged: `quantize` would not repair it, since it takes the artifact as finished."""
AGAIN = "Delete it and run the same command again."
"""Advice if a file that a stopped run left is damaged."""


def install(extra: str) -> str:
    """Returns the command that installs one of lqexport's extras, as the end of a message."""
    return f"pip install '.[{extra}]' in the folder of lqexport's repository"


class UserError(Exception):
    """An error that the user can fix, such as bad input or a path that cannot be written.

    The command line prints the message without a traceback and exits with status 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Returns a text that is safe to print on a terminal, also if parts of it come from a file.

    Control characters, which a terminal would obey, become escapes. The middle of a text of more than LONGEST
    characters is left out.
    """
    shown = "".join(
        letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape").decode()
        for letter in text
    )
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 300]} ... {shown[-300:]}"


def check_least(least: float, **numbers: float | None) -> None:
    """Raises UserError if one of the numbers, which are given by their names, is below `least` or not finite.

    None stands for a number that is not given.
    """
    for name, number in numbers.items():
        if number is not None and not (number >= least and math.isfinite(number)):
            raise UserError(f"{name} must be at least {least:g}, not {number}.")


def listed(items: Sequence[str], most: int = 5) -> str:
    """Returns the first `most` items with commas between, and how many more there are: `a, b and 3 more`."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


@contextlib.contextmanager
def well_formed(content: object, advice: str = "") -> Iterator[None]:
    """Turns exceptions about malformed content into a UserError, in a context that parses a file.

    content   the file or the part of it that is parsed, as the message names it
    advice    the end of the message: what the user can do

    Files come from others, and JSON may hold any type anywhere. One check here replaces a check at every use. Raises
    UserError for the exceptions in MALFORMED.
    """
    try:
        yield
    except MALFORMED as error:
        sentence = f"{content} is damaged, or of another form than expected ({type(error).__name__}: {error})."
        raise UserError(f"{sentence} {advice}".strip()) from error


@contextlib.contextmanager
def with_advice(advice: str) -> Iterator[None]:
    """Adds what the user can do to the end of a UserError of the context."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error} {advice}".strip()) from error


@contextlib.contextmanager
def files_at_hand() -> Iterator[None]:
    """Turns an OSError of the context, such as a file that cannot be read, into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or 'A file'}: {error.strerror or error}.") from error
