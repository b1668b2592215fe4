"""Runs llama.cpp in a child process, so that a file on which llama.cpp aborts ends that process and not this one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from lqexport.errors import UserError, printable
from lqexport.evaluation import llamacpp
from lqexport.evaluation.llamacpp_child import LENGTH

PATIENCE = 600.0
"""Seconds without a sign of life after which llama.cpp is ended.

It gives one while it loads a file, and before each operation of a sequence's graph. The largest ones are output layers:
that of Llama-3.1-405B takes 2.2e12 floating-point operations on the 512 tokens that run at a time.
"""
LINES = 6
"""The number of lines that are quoted of what llama.cpp printed last."""
WARNINGS = 5
"""The most warnings of llama.cpp that are passed on."""

IGNORED = "default special token"
"""A part of warnings that say nothing of a file: llama.cpp's own default ids are not in a small vocabulary."""

# A child that starts with the modules' paths of this process finds the same lqexport.
_START = "import sys; sys.path[:] = sys.argv[1:]; from lqexport.evaluation.llamacpp_child import main; main()"


class LlamaCppFailed(UserError):
    """llama.cpp did not load or run a file: it refused, aborted or hung. The fault may be the file's."""


class LlamaCppProcess:
    """A GGUF file loaded in llama.cpp in a child process, which loads it once. The methods are those of `LlamaCpp`.

    It is a context manager; the child lives until `close`.

    n_ctx, threads, adapter, embeddings, vocabulary_only   as of `LlamaCpp`
    patience   the most seconds without a sign of life

    The attribute `warnings` has the different warnings of llama.cpp while it loaded the file, at most WARNINGS. Raises
    UserError if the wheel is missing or cannot be used here. The constructor and all methods raise LlamaCppFailed, with
    what llama.cpp said or printed last, if llama.cpp refuses the file, ends its process, or hangs.
    """

    def __init__(self, path: Path, n_ctx: int, threads: int | None = None, adapter: Path | None = None,
                 embeddings: bool = False, vocabulary_only: bool = False,
                 patience: float = PATIENCE) -> None:  # fmt: skip
        llamacpp.check_installed()
        if not path.is_file():
            raise UserError(f"There is no file {path}.")
        self._path, self._patience = path, patience
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115  # closed in `close`
        self._child = subprocess.Popen(
            [sys.executable, "-c", _START, str(Path(__file__).parents[2]), *sys.path],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._printed,
            env=os.environ | {"GGML_NO_BACKTRACE": "1"},  # a backtrace is long, and may start a debugger
            start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the child
        )  # fmt: skip
        options = {"path": str(path.absolute()), "n_ctx": n_ctx, "threads": threads, "embeddings": embeddings,
                   "vocabulary_only": vocabulary_only}  # fmt: skip
        try:
            loaded = self._ask(options | {"adapter": str(adapter.absolute()) if adapter else None}, "loaded")
        except BaseException:
            self.close()
            raise
        self.n_vocab: int = loaded["n_vocab"]
        self.warnings = _few(loaded["warnings"])

    def tokenize(self, text: str) -> list[int]:
        """Returns the token ids of `text`, as `LlamaCpp.tokenize` does."""
        return self._ask(["tokenize", text], "split text by")

    def logits(self, tokens: list[int], first: int = 0) -> NDArray[np.float32]:
        """Returns the logits of one sequence from position `first` on, as `LlamaCpp.logits` does."""
        return self._ask(["logits", tokens, first], "ran")

    def logits_at(self, tokens: list[int], positions: list[int]) -> NDArray[np.float32]:
        """Returns the logits of one sequence at some positions, as `LlamaCpp.logits_at` does."""
        return self._ask(["logits_at", tokens, positions], "ran")

    def embedding(self, tokens: list[int]) -> NDArray[np.float32]:
        """Returns an encoder's pooled embedding of one sequence, as `LlamaCpp.embedding` does."""
        return self._ask(["embedding", tokens], "ran")

    def close(self) -> None:
        """Ends the child. It may be called twice."""
        self._child.kill()
        self._child.wait()
        assert self._child.stdin is not None and self._child.stdout is not None  # noqa: PT018
        with contextlib.suppress(BrokenPipeError):  # a request that the child did not take
            self._child.stdin.close()
        self._child.stdout.close()
        self._printed.close()

    def __enter__(self) -> LlamaCppProcess:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, request: Any, doing: str) -> Any:
        """Sends a request and returns its result. `doing` says what llama.cpp did to the file, if it failed."""
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
            return _result(answer)
        raise LlamaCppFailed(f"llama.cpp {ending} when it {doing} {self._path}.{last_lines(self._printed)}")

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


def _result(answer: dict[str, Any]) -> Any:
    """Returns the result that an answer has. Raises UserError and LlamaCppFailed as the methods do."""
    if "missing" in answer:
        raise UserError(answer["missing"])
    if "refused" in answer:
        raise LlamaCppFailed(answer["refused"])
    return answer["value"]


def _few(lines: list[str]) -> list[str]:
    """Returns a sentence for each sort of warning, at most WARNINGS.

    Warnings of one sort differ in numbers and in quoted names.
    """
    sorts: dict[str, list[str]] = {}
    for line in lines:
        if IGNORED not in line:
            sorts.setdefault(re.sub(r"'.*?'|\d+", "", line), []).append(line)
    sentences = []
    for first, *others in list(sorts.values())[:WARNINGS]:
        more = f" (and {len(others)} more such lines)" if others else ""
        sentences.append(f"llama.cpp warns: {printable(first)}{more}")
    return sentences
