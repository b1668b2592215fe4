"""The child process in which another program's library runs one file. `engine_process` starts it.

The library may end its process, as llama.cpp does where an assertion fails. The parent outlives that, since it never
loads the library.

A request is a line of JSON on standard input. The first one has the keyword arguments of the engine; every other one is
a method's name and its arguments, `["tokenize", "text"]`. An answer on standard output is the number of its bytes
(`LENGTH`), then JSON of one of these forms:

    {"alive": true}             the engine is at work; any number of them come before an answer of another form
    {"value": ...}              the result; of the first request, facts of the loaded file
    {"array": [rows, columns]}  the result is float32 in machine order, whose bytes follow the JSON
    {"refused": "sentence"}     the engine does not load or run the file
    {"missing": "sentence"}     the engine itself cannot be used

This module must import quickly: nothing of torch or transformers.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

from lqexport.errors import UserError

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
            os._exit(1)  # not an exception, which would be lost in a callback of the library
        self._sent = time.monotonic()

    def alive(self) -> None:
        """Tells the parent that the engine is at work, if nothing was sent for a while."""
        if time.monotonic() - self._sent >= INTERVAL:
            self.send({"alive": True})

    def result(self, result: Any) -> None:
        """Writes the result of a request: an array or a JSON value."""
        if isinstance(result, np.ndarray):
            self.send({"array": result.shape}, np.ascontiguousarray(result).data)
        else:
            self.send({"value": result})


def answer_requests(engine: Any, requests: Iterator[bytes], answers: Answers) -> None:
    """Calls the engine's methods that requests name, until there are no more."""
    for line in requests:
        name, *arguments = json.loads(line)
        answers.result(getattr(engine, name)(*arguments))


@contextlib.contextmanager
def refusals(answers: Answers) -> Iterator[None]:
    """Answers that the engine refuses the file, where the context raises UserError."""
    try:
        yield
    except UserError as error:
        answers.send({"refused": str(error)})


def serve_parent(serve: Callable[[Iterator[bytes], Answers], None]) -> None:
    """Lets `serve` answer the process that started this one."""
    import resource  # not on every system

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # an assertion that fails would write all memory to the disk
    stream = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the library prints must not get between the answers
    serve(iter(sys.stdin.buffer.readline, b""), Answers(stream))
