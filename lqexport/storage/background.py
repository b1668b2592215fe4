"""What goes on while the solver works: the last tensor is written, and the next block read into the system's cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import NamedTuple, Protocol, runtime_checkable

CHUNK = 1 << 23
"""Bytes read at once."""


class FileSpan(NamedTuple):
    """Where a tensor's bytes are."""

    path: Path
    start: int
    nbytes: int


@runtime_checkable
class KnowsItsFiles(Protocol):
    """Weights that know where they are on disk."""

    def file_spans(self, name: str) -> list[FileSpan]:
        """Of a tensor's parts."""


class OneBehind:
    """Does one thing in the background. The next waits until that is done."""

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Raises what the work before raised."""
        self.wait()
        self._pending = self._worker.submit(work)

    def wait(self) -> None:
        """Until nothing is left to do. Raises what the work raised."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()


def read_ahead(weights: object, names: Iterable[str]) -> None:
    """Have tensors read into the system's cache, where it is known where they are. Nothing waits for it."""
    if isinstance(weights, KnowsItsFiles):
        file_spans = [span for name in names for span in weights.file_spans(name)]
        Thread(target=_read, args=(file_spans,), daemon=True).start()


def _read(file_spans: list[FileSpan]) -> None:
    buffer = bytearray(CHUNK)
    with suppress(OSError):  # whoever needs the bytes will say what is wrong
        for path, start, nbytes in file_spans:
            with path.open("rb", buffering=0) as file:
                for at in range(start, start + nbytes, CHUNK):
                    os.preadv(file.fileno(), [memoryview(buffer)[: min(CHUNK, start + nbytes - at)]], at)
