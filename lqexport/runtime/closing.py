"""Context managers that are closed at their end."""

from __future__ import annotations

from types import TracebackType
from typing import TypeVar

Opened = TypeVar("Opened", bound="Closing")


class Closing:
    """A base of classes that hold what `close` frees. As a context manager, it calls `close` at the end."""

    def close(self) -> None:
        """Frees what the object holds. It may be called twice."""
        raise NotImplementedError

    def __enter__(self: Opened) -> Opened:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
