"""Opens the tokenizer of a written model."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lqexport.models.source import GGUFSource, load_tokenizer


def tokenizer_of(path: Path) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a .gguf file, a folder in Hugging Face layout, or an artifact.

    Raises UserError if it cannot be loaded.
    """
    if path.is_file():
        return GGUFSource(path).tokenizer()
    return load_tokenizer(path / "model" if (path / "run.json").is_file() else path)
