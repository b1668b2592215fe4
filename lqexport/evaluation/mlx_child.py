"""The child process in which mlx-lm runs one folder (see `engine_child`). `mlx_process` starts it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from lqexport.evaluation.engine_child import Answers, answer_requests, refusals, serve_parent
from lqexport.evaluation.mlx_lm import MlxLm


def serve(requests: Iterator[bytes], answers: Answers) -> None:
    """Loads the folder of the first request, and answers all others until there are no more, or one is refused.

    The result of the first is `stops`, the tokens at which mlx-lm stops.
    """
    with refusals(answers):
        engine = MlxLm(Path(json.loads(next(requests))["path"]))
        answers.result({"stops": engine.stops()})
        answer_requests(engine, requests, answers)


def main() -> None:
    """Serves the process that started this one."""
    serve_parent(serve)
