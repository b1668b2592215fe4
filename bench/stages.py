"""Running a command of lqexport, and timing its stages by when the lines that begin and end them come."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Timed:
    """Seconds of a command and of its stages, by what it calls them, and what it printed."""

    seconds: float
    stages: dict[str, float]
    printed: str


def timed(command: list[str], environment: dict[str, str]) -> Timed:
    """Run a command to its end, its standard error handed on. Ends this program where that fails."""
    began = time.perf_counter()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        stages, printed = _stages(running), running.stdout.read()
    if running.returncode:
        sys.exit(f"{' '.join(command)} ended with exit status {running.returncode}.")
    return Timed(time.perf_counter() - began, stages, printed)


def _stages(running: subprocess.Popen[str]) -> dict[str, float]:
    began, seconds = {}, {}
    for line in running.stderr or ():
        sys.stderr.write(line)
        if ended := re.fullmatch(r"(.*): done, .*", line.strip()):
            seconds[ended[1]] = time.perf_counter() - began.get(ended[1], time.perf_counter())
        else:
            began[line.strip()] = time.perf_counter()
    return seconds
