"""Asks llama.cpp, in a child process, how it splits texts with the vocabulary of a GGUF file."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from lqexport.evaluation.llamacpp_process import LlamaCppProcess


@functools.lru_cache(maxsize=4)
def llamacpp_splits(content: bytes, texts: tuple[str, ...]) -> list[list[int]]:
    """Returns the token ids that llama.cpp makes of each text, without tokens at the ends.

    content   a GGUF file with a tokenizer; it needs no tensors

    Raises LlamaCppFailed if llama.cpp does not load the file, and UserError if llama.cpp cannot be used here.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        path.write_bytes(content)
        with LlamaCppProcess(path, 32, vocabulary_only=True) as engine:
            return [engine.tokenize(text) for text in texts]
