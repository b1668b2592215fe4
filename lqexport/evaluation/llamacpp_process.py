"""Runs llama.cpp in a child process, so that a file on which llama.cpp aborts ends that process and not this one."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lqexport.errors import UserError, printable
from lqexport.evaluation import llamacpp
from lqexport.evaluation.engine_process import PATIENCE, EngineFailed, EngineProcess

WARNINGS = 5
"""The most warnings of llama.cpp that are passed on."""

IGNORED = "default special token"
"""A part of warnings that say nothing of a file: llama.cpp's own default ids are not in a small vocabulary."""


class LlamaCppFailed(EngineFailed):
    """llama.cpp did not load or run a file: it refused, aborted or hung. The fault may be the file's."""


class LlamaCppProcess(EngineProcess):
    """A GGUF file loaded in llama.cpp in a child process, which loads it once. The methods are those of `LlamaCpp`.

    n_ctx, threads, adapter, embeddings, part   as of `LlamaCpp`
    patience   as of `EngineProcess`

    The attribute `warnings` has the different warnings of llama.cpp while it loaded the file, at most WARNINGS. Raises
    UserError if the wheel is missing or cannot be used here, and LlamaCppFailed as `EngineProcess` does.
    """

    engine, child, failure = "llama.cpp", "lqexport.evaluation.llamacpp_child", LlamaCppFailed

    def __init__(self, path: Path, n_ctx: int, threads: int | None = None, adapter: Path | None = None,
                 embeddings: bool = False, part: llamacpp.Part = "all",
                 patience: float = PATIENCE) -> None:  # fmt: skip
        llamacpp.check_installed()
        if not path.is_file():
            raise UserError(f"There is no file {path}.")
        options = {"n_ctx": n_ctx, "threads": threads, "embeddings": embeddings, "part": part}
        super().__init__(path, options | {"adapter": str(adapter.absolute()) if adapter else None}, patience)
        self.n_vocab: int = self.loaded["n_vocab"]
        self.warnings = _few(self.loaded["warnings"])

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
