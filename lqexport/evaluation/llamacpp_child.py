"""The child process in which llama.cpp runs one file. `llamacpp_process` starts it.

llama.cpp ends its process where an assertion fails. The parent outlives that, since it never loads the library.

A request is a line of JSON on standard input. The first one has the keyword arguments of `LlamaCpp`; every other one is
a method's name and its arguments, `["tokenize", "text"]`. An answer on standard output is the number of its bytes
(`LENGTH`), then JSON of one of these forms:

    {"alive": true}             llama.cpp is at work; any number of them come before an answer of another form
    {"value": ...}              the result; of the first request, `n_vocab` and `warnings`
    {"array": [rows, columns]}  the result is float32 in machine order, whose bytes follow the JSON
    {"refused": "sentence"}     llama.cpp does not load or run the file
    {"missing": "sentence"}     llama.cpp itself cannot be used

This module must import quickly: nothing of torch or transformers.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lqexport.errors import UserError
from lqexport.evaluation.llamacpp import LlamaCpp, echo_log

LENGTH = struct.Struct("=Q")
"""The number of bytes of an answer's JSON, which comes before it."""
INTERVAL = 1.0
"""Seconds between two signs of life."""


class Answers:
    """Writes answers to the parent, and ends the process once the parent does not read them any more."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._sent = time.monotonic()

    def send(self, answer: dict[str, Any], content: Any = b"") -> None:
        """Writes one answer, and the bytes that follow it."""
        encoded = json.dumps(answer).encode()
        try:
            self._stream.write(LENGTH.pack(len(encoded)) + encoded)
            self._stream.write(content)
            self._stream.flush()
        except OSError:
            os._exit(1)  # not an exception, which would be lost in a callback of llama.cpp
        self._sent = time.monotonic()

    def alive(self) -> None:
        """Tells the parent that llama.cpp is at work, if nothing was sent for a while."""
        if time.monotonic() - self._sent >= INTERVAL:
            self.send({"alive": True})

    def result(self, result: Any) -> None:
        """Writes the result of a request: an array or a JSON value."""
        if isinstance(result, np.ndarray):
            self.send({"array": result.shape}, np.ascontiguousarray(result).data)
        else:
            self.send({"value": result})


def serve(requests: Iterator[bytes], answers: Answers) -> None:
    """Loads the file of the first request, and answers all others until there are no more, or until one is refused."""
    try:
        echo_log()
    except UserError as error:
        answers.send({"missing": str(error)})
        return
    with _refusals(answers):
        options = json.loads(next(requests))
        path, adapter = Path(options.pop("path")), options.pop("adapter")
        with LlamaCpp(path, adapter=Path(adapter) if adapter else None, alive=answers.alive, **options) as engine:
            answers.result({"n_vocab": engine.n_vocab, "warnings": engine.warnings})
            for line in requests:
                name, *arguments = json.loads(line)
                answers.result(getattr(engine, name)(*arguments))


@contextlib.contextmanager
def _refusals(answers: Answers) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        answers.send({"refused": str(error)})


def main() -> None:
    """Serves the process that started this one."""
    import resource  # not on every system

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # an assertion that fails would write all memory to the disk
    stream = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the library prints must not get between the answers
    serve(iter(sys.stdin.buffer.readline, b""), Answers(stream))
