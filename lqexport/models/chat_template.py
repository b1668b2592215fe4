"""Renders conversations by the chat template of a tokenizer, a program from elsewhere: for a few seconds at most."""

from __future__ import annotations

import contextlib
import copy
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SECONDS = 10.0
"""The most seconds that one rendering may take: a template from elsewhere can loop for ever."""


def rendered(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """Returns the text that transformers makes of a conversation.

    messages   each with a "role" and its "content"
    options    further arguments of transformers' `apply_chat_template`, and variables that the template sees

    Raises what the template raises, and TimeoutError after SECONDS.
    """
    with _limited(SECONDS):
        return str(tokenizer.apply_chat_template(copy.deepcopy(list(messages)), tokenize=False, **options))


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in a context that takes longer. Only the main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: Any) -> None:
        raise TimeoutError(f"it took more than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def refusal(error: Exception) -> str:
    """Returns what a template said when it refused a conversation, on one line of at most 100 characters."""
    return " ".join(str(error).split())[:100] or type(error).__name__
