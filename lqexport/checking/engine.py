"""Loads a file in llama.cpp, where it is installed, and says what llama.cpp makes of it."""

from __future__ import annotations

from typing import Literal

from lqexport.checking.opened import OpenFile
from lqexport.checking.problems import Problem, error, warning
from lqexport.errors import UserError
from lqexport.evaluation import llamacpp
from lqexport.evaluation.llamacpp_process import LlamaCppFailed, LlamaCppProcess

Loaded = Literal["loads", "refuses", "not installed", "not tried"]
CONTEXT = 32
"""Tokens of the context with which a file is loaded."""


def load(file: OpenFile) -> tuple[Loaded, list[Problem]]:
    """Returns what llama.cpp does with a file, and the problems that it names."""
    try:
        llamacpp.check_installed()
    except UserError:
        return "not installed", []
    try:
        with LlamaCppProcess(file.path, CONTEXT, embeddings=any(entry.encoder for entry in file.entries)) as engine:
            return "loads", [warning("engine", f"{sentence}.") for sentence in engine.warnings]
    except LlamaCppFailed as failure:
        return "refuses", [error("engine", str(failure))]
