"""Tells of an exception that no command expects: one sentence on the terminal, and a log file with the traceback."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
import tempfile
import traceback

from lqexport.errors import printable

STATUS = 3
"""The exit status of a command that an unexpected exception ended. 1 would read as a limit that was exceeded."""
SHOW = "LQEXPORT_TRACEBACK"
"""The environment variable that, if it is set and not 0, has the traceback printed."""
LOGGED_PACKAGES = ("lqexport", "torch", "transformers", "safetensors", "numpy", "numba")


def unexpected(error: Exception) -> str:
    """Returns the message for an unexpected exception, whose traceback is written to a log file.

    The message has the traceback itself if the environment variable LQEXPORT_TRACEBACK asks for it, or if no log file
    can be written.
    """
    trace = "".join(traceback.format_exception(error))
    reason = " ".join(str(error).split())
    named = printable(f"{type(error).__name__}{f' ({reason})' if reason else ''}")
    try:
        log = _logged(trace)
    except OSError as failure:
        return f"{trace}error: The command ended with an unexpected {named}; no log file can be written ({failure})."
    shown = trace if os.environ.get(SHOW, "0") not in ("", "0") else ""
    return f"{shown}error: The command ended with an unexpected {named}; its traceback is in {log}."


def _logged(trace: str) -> str:
    """Writes the command, the versions and a traceback to a new file in the folder for temporary files.

    Returns the file's path. Raises OSError if it cannot be written.
    """
    with tempfile.NamedTemporaryFile(
        "w", prefix="lqexport-", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
    ) as file:
        file.write(f"{shlex.join(sys.argv)}\nPython {platform.python_version()} on {platform.platform()}\n")
        file.writelines(f"{package} {_version(package)}\n" for package in LOGGED_PACKAGES)
        file.write(f"\n{trace}")
    return file.name


def _version(package: str) -> str:
    """Returns the installed version of a package, or that it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed"
