"""Progress reports of long operations: the interface of a listener, and listeners for terminals, logs and callbacks."""

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
    """The receiver of progress reports. One stage runs at a time; a new stage ends the one before."""

    def stage(self, description: str, total: float) -> None:
        """Reports that a stage begins. `total` is its amount of work, in the unit that `advance` uses.

        A total of 0 means that the amount is not known.
        """

    def advance(self, amount: float) -> None:
        """Reports that another `amount` of the stage's work is done."""

    def message(self, text: str) -> None:
        """Reports a line that the user should see and that should stay visible, such as a warning."""


class Silent:
    """A listener that ignores every report: the default of every function that takes a listener."""

    def stage(self, description: str, total: float) -> None: ...

    def advance(self, amount: float) -> None: ...

    def message(self, text: str) -> None: ...


class Callback:
    """A listener that calls functions of the caller.

    on_progress   called with a stage's description and the share of it that is done, 0 to 1
    on_message    called with each line that the user should see

    An exception that a function raises stops the operation. The same call made again resumes where it stopped.
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
    """Stops the operation at its next report after a first Ctrl-C or SIGTERM, and immediately after a second.

    An exception raised immediately would be lost inside a C callback, for example while numba compiles: Python prints
    such an exception with its traceback and continues.
    """

    interrupted: int | None = None
    """The number of the signal; None before one came. KeyboardInterrupt has it as its argument."""

    def interrupt(self, number: int, *_: object) -> None:
        """Handles SIGINT and SIGTERM. Raises KeyboardInterrupt at the second signal."""
        if self.interrupted is not None:
            raise KeyboardInterrupt(number)
        self.interrupted = number
        self.message("Stopping after this step. Press Ctrl-C again to stop at once.")

    def message(self, text: str) -> None:
        """Shows a line."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises KeyboardInterrupt if a signal came."""
        if self.interrupted is not None:
            raise KeyboardInterrupt(self.interrupted)


class Lines(Interruptible):
    """A listener for logs and pipes, which prints lines.

    It prints one line when a stage begins, at most one every `interval` seconds while the stage runs, and one when it
    ends. So the log of a killed run shows how far the run came. The time left follows from the work since the stage's
    first report, which in a resumed run tells of what an earlier run did.
    """

    def __init__(self, console: Console, interval: float = 30.0) -> None:
        self.console = console
        self.interval = interval
        self.description = ""
        self.total = self.done = 0.0
        self.started = self.reported = 0.0
        self.first: tuple[float, float] | None = None  # when the stage's first report came, and what was done by then

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.description:
            self._print_state("done" if error is None else "stopped")

    def stage(self, description: str, total: float) -> None:
        self.check()
        if self.description:
            self._print_state("done")
        self.description, self.total, self.done, self.first = description, total, 0.0, None
        self.started = self.reported = time.monotonic()
        self._print(description)

    def advance(self, amount: float) -> None:
        self.check()
        self.done += amount
        now = time.monotonic()
        self.first = self.first or (now, self.done)
        if now - self.reported >= self.interval:
            self._print_state("running")

    def message(self, text: str) -> None:
        self._print(text)

    def _print_state(self, state: str) -> None:
        self.reported = time.monotonic()
        seconds = self.reported - self.started
        share = min(1.0, self.done / self.total) if self.total else 0.0
        left = self._left() if state == "running" and self.total else ""
        self._print(f"{self.description}: {state}{f', {share:.0%}' if self.total else ''} in {seconds:.0f} s{left}")

    def _left(self) -> str:
        """Returns the time left as words; nothing if no work has been reported since the first report."""
        since, before = self.first or (0.0, 0.0)
        worked = self.done - before
        seconds = (self.reported - since) / worked * max(0.0, self.total - self.done) if worked > 0 else None
        return "" if seconds is None else f", about {seconds:.0f} s left"

    def _print(self, text: str) -> None:
        """Prints a line, which is not folded, however long it is."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class Bars(Interruptible):
    """A listener for terminals, which shows a bar with the time left for each stage."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        self.progress = Progress(
            *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console
        )
        self.task: TaskID | None = None

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._end_stage()
        self.progress.stop()

    def stage(self, description: str, total: float) -> None:
        self.check()
        self._end_stage()
        self.task = self.progress.add_task(description, total=total or None)  # a bar without a total moves all the time

    def advance(self, amount: float) -> None:
        self.check()
        if self.task is not None:
            self.progress.advance(self.task, amount)

    def message(self, text: str) -> None:
        self.progress.console.print(text, markup=False, highlight=False)

    def _end_stage(self) -> None:
        """Fills the bar, since a stage may do less work than it announced, for example in a resumed run."""
        if self.task is not None:
            total = self.progress.tasks[self.task].total or 1.0
            self.progress.update(self.task, total=total, completed=total)


@contextlib.contextmanager
def terminal_listener() -> Iterator[Bars | Lines]:
    """Opens a listener on standard error: bars on a terminal, lines elsewhere.

    While it is open, it handles Ctrl-C, and SIGTERM alike (see `Interruptible`).
    """
    console = Console(stderr=True)
    listener = Bars(console) if sys.stderr.isatty() else Lines(console)
    before = {number: signal.signal(number, listener.interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with listener:
            yield listener
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
