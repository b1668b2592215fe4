"""Runs another program's library in a child process, so that a file on which it aborts ends that process alone."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np

from lqexport.errors import UserError
from lqexport.evaluation.engine_child import LENGTH
from lqexport.runtime.closing import Closing

PATIENCE = 600.0
"""Seconds without a sign of life after which an engine is ended.

llama.cpp gives one while it loads a file, and before each operation of a sequence's graph. The largest ones are output
layers: that of Llama-3.1-405B takes 2.2e12 floating-point operations on the 512 tokens that run at a time.
"""
LINES = 6
"""The number of lines that are quoted of what an engine printed last."""


class EngineFailed(UserError):
    """An engine did not load or run a file: it refused, aborted or hung. The fault may be the file's."""


class EngineProcess(Closing):
    """A file loaded by an engine in a child process, which loads it once.

    It is a context manager; the child lives until `close`. A subclass has the engine's methods.

    path       the file or folder
    options    what the child's first request has
    patience   the most seconds without a sign of life

    The attribute `loaded` has the result of the first request. Raises UserError if the engine cannot be used here. The
    constructor and all methods raise `failure`, with what the engine said or printed last, if it refuses the file, ends
    its process, or hangs.
    """

    engine: ClassVar[str]
    """The engine's name, for messages."""
    child: ClassVar[str]
    """The module of the child process."""
    failure: ClassVar[type[EngineFailed]] = EngineFailed

    def __init__(self, path: Path, options: dict[str, Any], patience: float = PATIENCE) -> None:
        self._path, self._patience = path, patience
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115  # closed in `close`
        # A child that starts with the modules' paths of this process finds the same lqexport.
        start = f"import sys; sys.path[:] = sys.argv[1:]; from {self.child} import main; main()"
        self._child = subprocess.Popen(
            [sys.executable, "-c", start, str(Path(__file__).parents[2]), *sys.path],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._printed,
            env=os.environ | {"GGML_NO_BACKTRACE": "1"},  # a backtrace is long, and may start a debugger
            start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the child
        )  # fmt: skip
        try:
            self.loaded: dict[str, Any] = self._ask(options | {"path": str(path.absolute())}, "loaded")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the child. It may be called twice."""
        self._child.kill()
        self._child.wait()
        assert self._child.stdin is not None and self._child.stdout is not None  # noqa: PT018
        with contextlib.suppress(BrokenPipeError):  # a request that the child did not take
            self._child.stdin.close()
        self._child.stdout.close()
        self._printed.close()

    def _ask(self, request: Any, doing: str) -> Any:
        """Sends a request and returns its result. `doing` says what the engine did to the file, if it failed."""
        assert self._child.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # the child has ended, as reading its answer will show
                self._child.stdin.write(json.dumps(request).encode() + b"\n")
                self._child.stdin.flush()
            answer = self._answer()
        except TimeoutError:
            ending = f"gave no sign of life for {self._patience:g} seconds"
        except EOFError:
            ending = f"ended with {ending_of(self._child)}"
        else:
            return result_of(answer, self.failure)
        raise self.failure(f"{self.engine} {ending} when it {doing} {self._path}.{last_lines(self._printed)}")

    def _answer(self) -> dict[str, Any]:
        """Returns the next answer that is no sign of life, with an array as `value`. Raises EOFError, TimeoutError."""
        answer: dict[str, Any] = {"alive": True}
        while "alive" in answer:
            (length,) = LENGTH.unpack(self._read(LENGTH.size))
            answer = json.loads(self._read(length))
        if "array" in answer:
            values = np.empty(answer["array"], np.float32)
            self._read_into(values.data.cast("B"))
            answer["value"] = values
        return answer

    def _read(self, length: int) -> bytes:
        content = bytearray(length)
        self._read_into(memoryview(content))
        return bytes(content)

    def _read_into(self, buffer: memoryview) -> None:
        """Fills a buffer with what the child writes. Raises EOFError if it ends, TimeoutError if nothing comes."""
        assert self._child.stdout is not None
        pipe, wait = self._child.stdout.fileno(), select.poll()
        wait.register(pipe, select.POLLIN)
        while len(buffer):
            if not wait.poll(1000 * self._patience):
                raise TimeoutError
            count = os.readv(pipe, [buffer])
            if not count:
                raise EOFError
            buffer = buffer[count:]


def ending_of(process: subprocess.Popen[bytes]) -> str:
    """Returns how a child process ended: `SIGABRT`, `exit status 1`."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    status = process.returncode
    if status is None or status >= 0:
        return f"exit status {status}"
    name = signal.Signals(-status).name
    return f"{name} (perhaps memory ran out)" if name == "SIGKILL" else name


def last_lines(printed: IO[bytes]) -> str:
    """Returns the last lines of what a child printed into a file, as the end of a message."""
    printed.seek(max(0, printed.seek(0, os.SEEK_END) - 4096))
    lines = [line.strip() for line in printed.read().decode(errors="replace").splitlines() if line.strip()]
    return f" It printed: {' / '.join(lines[-LINES:])}" if lines else ""


def result_of(answer: dict[str, Any], failure: type[EngineFailed]) -> Any:
    """Returns the result that an answer has. Raises UserError and `failure` as the methods do."""
    if "missing" in answer:
        raise UserError(answer["missing"])
    if "refused" in answer:
        raise failure(answer["refused"])
    return answer["value"]
