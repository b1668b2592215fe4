"""The one error that users see: a sentence that says what is wrong, where, and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

LONGEST = 1500
"""Characters of a sentence that are shown: parts of it may come from a file, and be of any length."""
MALFORMED = (
    ArithmeticError, AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError,
)  # fmt: skip
"""What reading raises where a file's content is of another form than it should be."""

ANEW = "Copy the artifact again, or quantize again into another folder."
"""What helps against damage to a finished artifact, which `quantize` takes as it is."""
AGAIN = "Delete it and run the same command again."
"""What helps against damage to what a stopped run left."""


class UserError(Exception):
    """Bad input or a bad place to write. The command line prints the message alone and exits with status 2."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """A text that may hold parts of a file, for a terminal: control characters, which a terminal would obey, as their
    escapes, and the middle of a very long text left out."""
    shown = "".join(
        letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape").decode()
        for letter in text
    )
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 300]} ... {shown[-300:]}"


@contextlib.contextmanager
def well_formed(what: object, advice: str = "") -> Iterator[None]:
    """Within, the content of a file is taken apart: where it is of another form, a UserError names the file, `what`,
    and ends with `advice`.

    Files come from others, and JSON may hold any type in any place: one check here instead of one at every use.
    """
    try:
        yield
    except MALFORMED as error:
        sentence = f"{what} is damaged, or of another form than expected ({type(error).__name__}: {error})."
        raise UserError(f"{sentence} {advice}".strip()) from error


@contextlib.contextmanager
def files_at_hand() -> Iterator[None]:
    """Within, a file that cannot be read or written for whatever reason of the system is a UserError that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or 'A file'}: {error.strerror or error}.") from error
