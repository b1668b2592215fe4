"""Progress on the terminal: what lines and bars say, and how Ctrl-C stops the work."""

from __future__ import annotations

import io
import signal

import pytest
import typer
from rich.console import Console

from lqexport.cli.common import plain_endings
from lqexport.runtime import progress
from lqexport.runtime.progress import Bars, Lines, terminal_listener


def console() -> tuple[Console, io.StringIO]:
    written = io.StringIO()
    return Console(file=written, width=200), written


def test_lines_tell_the_last_state() -> None:
    target, written = console()
    with Lines(target) as listener:
        listener.stage("Solve", 4)
        listener.advance(1)
        listener.message("[bold] is no markup")
        listener.stage("Write", 2)
        listener.advance(2)
    lines = written.getvalue().splitlines()
    assert lines == ["Solve", "[bold] is no markup", "Solve: done, 25% in 0 s", "Write", "Write: done, 100% in 0 s"]


def test_lines_tell_how_far_a_stopped_run_was() -> None:
    target, written = console()
    listener = Lines(target, interval=0)
    listener.stage("Solve", 4)
    listener.advance(2)
    listener.advance(1)
    listener.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert "Solve: running, 75% in 0 s, about 0 s left" in written.getvalue()
    assert written.getvalue().endswith("Solve: stopped, 75% in 0 s\n")


def test_the_time_left_does_not_count_what_an_earlier_run_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run reports at once that 80 of 100 are done. The next 5 take 50 s, so the last 15 take 150 s."""
    target, written = console()
    listener, clock = Lines(target), iter([0.0, 1.0, 51.0, 51.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    listener.stage("Solve", 100)
    listener.advance(80)
    listener.advance(5)
    assert "Solve: running, 85% in 51 s, about 150 s left" in written.getvalue()


@pytest.mark.parametrize("listener_type", [Lines, Bars])
def test_the_first_ctrl_c_stops_at_the_next_advance(listener_type: type[Lines] | type[Bars]) -> None:
    target, written = console()
    listener = listener_type(target)
    listener.stage("Compile", 1)
    listener.advance(0.5)
    listener.interrupt(signal.SIGINT)
    assert "Ctrl-C again" in written.getvalue()
    with pytest.raises(KeyboardInterrupt):
        listener.advance(0.5)
    with pytest.raises(KeyboardInterrupt):
        listener.stage("Write", 1)


def test_the_second_ctrl_c_stops_at_once() -> None:
    listener = Lines(console()[0])
    listener.interrupt(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        listener.interrupt(signal.SIGINT)


def test_sigterm_stops_at_the_next_stage_with_its_own_status() -> None:
    handler = signal.getsignal(signal.SIGTERM)

    def command() -> None:
        with plain_endings("Stopped."), terminal_listener() as listener:
            listener.stage("Compile", 1)
            signal.raise_signal(signal.SIGTERM)
            listener.stage("Write", 1)

    with pytest.raises(typer.Exit) as ending:
        command()
    assert ending.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == handler


def test_bars_fill_when_a_stage_ends() -> None:
    target, written = console()
    with Bars(target) as listener:
        listener.stage("Solve", 4)
        listener.advance(1)
        listener.stage("Write", 2)
        assert listener.progress.tasks[0].finished
        assert not listener.progress.tasks[1].finished
        listener.message("kept")
    assert "kept" in written.getvalue()
    assert listener.progress.tasks[1].finished


def test_a_stage_of_unknown_length_moves_and_ends_full() -> None:
    """It is shown from its beginning, so that nobody waits in front of a silent screen."""
    for listener in (Bars(Console(file=io.StringIO())), Lines(Console(file=io.StringIO()))):
        with listener:
            listener.stage("Open the source", 0)
            if isinstance(listener, Bars):
                assert listener.progress.tasks[0].total is None
        if isinstance(listener, Bars):
            assert listener.progress.tasks[0].finished
        else:
            assert "Open the source: done in 0 s" in listener.console.file.getvalue()  # type: ignore[attr-defined]
