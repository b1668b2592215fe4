"""The child process in which llama.cpp runs one file (see `engine_child`). `llamacpp_process` starts it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from lqexport.errors import UserError
from lqexport.evaluation.engine_child import Answers, answer_requests, refusals, serve_parent
from lqexport.evaluation.llamacpp import LlamaCpp, echo_log


def serve(requests: Iterator[bytes], answers: Answers) -> None:
    """Loads the file of the first request, and answers all others until there are no more, or until one is refused.

    The result of the first is `n_vocab` and `warnings`.
    """
    try:
        echo_log()
    except UserError as error:
        answers.send({"missing": str(error)})
        return
    with refusals(answers):
        options = json.loads(next(requests))
        path, adapter = Path(options.pop("path")), options.pop("adapter")
        with LlamaCpp(path, adapter=Path(adapter) if adapter else None, alive=answers.alive, **options) as engine:
            answers.result({"n_vocab": engine.n_vocab, "warnings": engine.warnings})
            answer_requests(engine, requests, answers)


def main() -> None:
    """Serves the process that started this one."""
    serve_parent(serve)
