"""The one error that users see: a sentence that says what is wrong, where, and what to do."""

from __future__ import annotations


class UserError(Exception):
    """Bad input or a bad place to write. The command line prints the message alone and exits with status 2."""
