"""Runs an lqexport command and times its stages, by the lines that it prints when a stage begins and ends."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Timed:
    """The seconds of a command, the seconds of its stages by name, and its standard output."""

    seconds: float
    stages: dict[str, float]
    printed: str


def timed(command: list[str], environment: dict[str, str]) -> Timed:
    """Runs a command to its end and passes on its standard error. Exits from this program if the command fails."""
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
    """Returns the seconds of each stage."""
    began, seconds = {}, {}
    for line in running.stderr or ():
        sys.stderr.write(line)
        if ended := re.fullmatch(r"(.*): done, .*", line.strip()):
            seconds[ended[1]] = time.perf_counter() - began.get(ended[1], time.perf_counter())
        else:
            began[line.strip()] = time.perf_counter()
    return seconds
