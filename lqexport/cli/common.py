"""Parts that several commands share: their endings and their output."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import typer
from rich.console import Console, RenderableType

from lqexport.cli.unexpected import STATUS, unexpected
from lqexport.errors import UserError

NOTHING_WRITTEN = "Stopped. Nothing was written under a final name; run the same command again."
BROKEN_PIPE = 141
"""The exit status after SIGPIPE: 128 and the signal's number."""


@contextlib.contextmanager
def plain_endings(stopped: str = NOTHING_WRITTEN) -> Iterator[None]:
    """Ends a command with sentences and exit statuses instead of tracebacks.

    A UserError becomes one line and status 2; Ctrl-C becomes `stopped` and status 130, SIGTERM 143; a reader of the
    output that has gone becomes status 141, as of a process that SIGPIPE ends; any other exception becomes one line
    that names a log file, and status 3.
    """
    errors = Console(stderr=True, soft_wrap=True)
    try:
        yield
    except UserError as error:
        errors.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as stop:
        errors.print(stopped, markup=False, highlight=False)
        raise typer.Exit(128 + (stop.args[0] if stop.args else signal.SIGINT)) from None
    except typer.Exit:
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it ends
        raise typer.Exit(BROKEN_PIPE) from None
    except Exception as error:
        errors.print(unexpected(error), style="red", markup=False, highlight=False)
        raise typer.Exit(STATUS) from error


def print_json(content: Any) -> None:
    """Prints JSON values."""
    print(json.dumps(content, indent=1))


class HasJson(Protocol):
    """A result that can be printed as JSON."""

    def as_json(self) -> dict[str, Any]:
        """Returns everything, as JSON values."""


Result = TypeVar("Result", bound=HasJson)


def print_result(result: Result, table: Callable[[Result], RenderableType], *, as_json: bool) -> None:
    """Prints a result: as JSON, or as what `table` makes of it."""
    if as_json:
        print_json(result.as_json())
    else:
        output().print(table(result))


class _Output(Console):
    """Standard output, which leaves it to `plain_endings` what happens if its reader has gone."""

    def on_broken_pipe(self) -> None:
        """Raises BrokenPipeError again. rich would end the process with status 1, which means an exceeded limit."""
        raise BrokenPipeError


def output() -> Console:
    """Returns standard output; wide if it is not a terminal, so that no table is folded in a log."""
    return _Output() if sys.stdout.isatty() else _Output(width=120)
