"""Disk work while the solver computes: the last tensor is written, and the next block is read into the page cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import NamedTuple, Protocol, runtime_checkable

CHUNK = 1 << 23
"""Bytes per read of `read_ahead`."""


class FileSpan(NamedTuple):
    """A run of bytes in a file that holds a tensor, or one of the stored tensors it is made of."""

    path: Path
    start: int
    nbytes: int


@runtime_checkable
class HasFileSpans(Protocol):
    """Weights that can say where their tensors are on disk."""

    def file_spans(self, name: str) -> list[FileSpan]:
        """Returns where the bytes of the tensor `name` are, one span for each stored tensor that it is made of."""


class BackgroundWorker:
    """Runs one task at a time in a background thread. A new task waits until the one before it is done."""

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Waits for the task before, then starts `work`. Raises what the task before raised."""
        self.wait()
        self._pending = self._worker.submit(work)

    def wait(self) -> None:
        """Waits until the running task is done. Raises what it raised."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()


def read_ahead(weights: object, names: Iterable[str]) -> None:
    """Starts reading tensors into the operating system's page cache, and returns at once.

    Does nothing for weights without `file_spans`.
    """
    if isinstance(weights, HasFileSpans):
        file_spans = [span for name in names for span in weights.file_spans(name)]
        Thread(target=_read, args=(file_spans,), daemon=True).start()


def _read(file_spans: list[FileSpan]) -> None:
    buffer = bytearray(CHUNK)
    with suppress(OSError):  # the code that needs the bytes reads them again and reports the error
        for path, start, nbytes in file_spans:
            with path.open("rb", buffering=0) as file:
                for offset in range(start, start + nbytes, CHUNK):
                    os.preadv(file.fileno(), [memoryview(buffer)[: min(CHUNK, start + nbytes - offset)]], offset)
