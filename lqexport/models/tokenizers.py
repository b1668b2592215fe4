"""The tokenizer that goes with a written model."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lqexport.models.source import GGUFSource, load_tokenizer


def tokenizer_of(path: Path) -> PreTrainedTokenizerBase:
    """Of a .gguf file, a folder of the hub's shape or an artifact. Raises UserError where it cannot be loaded."""
    if path.is_file():
        return GGUFSource(path).tokenizer()
    return load_tokenizer(path / "model" if (path / "run.json").is_file() else path)
