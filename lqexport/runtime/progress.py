"""How long work tells what it is doing, without knowing who listens."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Listener(Protocol):
    """What the pipeline and the verifier report to. One stage runs at a time; a new one ends the one before."""

    def stage(self, description: str, total: float) -> None:
        """A stage begins; `total` is its amount of work in any unit that `advance` shares."""

    def advance(self, amount: float) -> None:
        """`amount` of the stage's work is done."""

    def message(self, text: str) -> None:
        """A line that the user should see and keep, such as a warning."""


class Silent:
    """A listener that keeps quiet: the default of every function that takes one."""

    def stage(self, description: str, total: float) -> None: ...

    def advance(self, amount: float) -> None: ...

    def message(self, text: str) -> None: ...


class Callback:
    """A listener that calls a function.

    on_progress   called with a stage's description and the share of it that is done, 0 to 1
    on_message    called with each line that the user should see

    Whatever the functions raise stops the work, which goes on where it was when the same call is made again.
    """

    def __init__(
        self, on_progress: Callable[[str, float], None], on_message: Callable[[str], None] | None = None
    ) -> None:
        self._on_progress, self._on_message = on_progress, on_message
        self._description, self._total, self._done = "", 0.0, 0.0

    def stage(self, description: str, total: float) -> None:
        self._description, self._total, self._done = description, total, 0.0
        self._on_progress(description, 0.0)

    def advance(self, amount: float) -> None:
        self._done += amount
        self._on_progress(self._description, min(1.0, self._done / self._total) if self._total else 1.0)

    def message(self, text: str) -> None:
        if self._on_message:
            self._on_message(text)


class Interruptible:
    """Stops the work at its next advance after a first Ctrl-C, and at once after a second.

    Raising at once would lose the interrupt where it arrives inside a C callback, as while numba compiles: Python
    prints such an exception, with its traceback, and goes on.
    """

    interrupted = False

    def interrupt(self, *_: object) -> None:
        """A handler of SIGINT."""
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        self.message("Stopping after this step. Press Ctrl-C again to stop at once.")

    def message(self, text: str) -> None:
        """Shows a line."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises KeyboardInterrupt where there was a first Ctrl-C."""
        if self.interrupted:
            raise KeyboardInterrupt


class Lines(Interruptible):
    """A listener for logs and pipes: one line when a stage begins, at most one every `interval` seconds while it
    runs and one when it ends, on standard error. So a killed run leaves a line that says how far it was."""

    def __init__(self, console: Console, interval: float = 30.0) -> None:
        self.console = console
        self.interval = interval
        self.description = ""
        self.total = self.done = 0.0
        self.began = self.told = 0.0

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.description:
            self._tell("done" if error is None else "stopped")

    def stage(self, description: str, total: float) -> None:
        self.check()
        if self.description:
            self._tell("done")
        self.description, self.total, self.done = description, total, 0.0
        self.began = self.told = time.monotonic()
        self.console.print(description, markup=False, highlight=False)

    def advance(self, amount: float) -> None:
        self.check()
        self.done += amount
        if time.monotonic() - self.told >= self.interval:
            self._tell("running")

    def message(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def _tell(self, state: str) -> None:
        self.told = time.monotonic()
        seconds = self.told - self.began
        share = min(1.0, self.done / self.total) if self.total else 1.0
        left = f", about {seconds / share - seconds:.0f} s left" if state == "running" and share > 0 else ""
        text = f"{self.description}: {state}, {share:.0%} in {seconds:.0f} s{left}"
        self.console.print(text, markup=False, highlight=False)


class Bars(Interruptible):
    """A listener for terminals: one bar per stage with the time left, on standard error."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        self.progress = Progress(
            *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console
        )
        self.task: TaskID | None = None

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self._end_stage()
        self.progress.stop()

    def stage(self, description: str, total: float) -> None:
        self.check()
        self._end_stage()
        self.task = self.progress.add_task(description, total=total)

    def advance(self, amount: float) -> None:
        self.check()
        if self.task is not None:
            self.progress.advance(self.task, amount)

    def message(self, text: str) -> None:
        self.progress.console.print(text, markup=False, highlight=False)

    def _end_stage(self) -> None:
        """Fill the bar: a stage may do less work than it announced, as a resumed run does."""
        if self.task is not None:
            self.progress.update(self.task, completed=self.progress.tasks[self.task].total)


@contextlib.contextmanager
def terminal_listener() -> Iterator[Bars | Lines]:
    """A listener on standard error: bars on a terminal, lines elsewhere. While it is open, Ctrl-C is theirs."""
    console = Console(stderr=True)
    listener = Bars(console) if sys.stderr.isatty() else Lines(console)
    before = signal.signal(signal.SIGINT, listener.interrupt)
    try:
        with listener:
            yield listener
    finally:
        signal.signal(signal.SIGINT, before)
