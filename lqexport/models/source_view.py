"""A source seen through a change of its weights or of its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lqexport.models.source import HuggingFaceSource, Source
from lqexport.storage.background import FileSpan, HasFileSpans
from lqexport.storage.files import write_json


class SourceView:
    """A source that reads as another one does. Subclasses change `read` or `config`.

    source   the source that it shows
    """

    def __init__(self, source: Source) -> None:
        self.source, self.name, self.fingerprint = source, source.name, source.fingerprint
        self.config: dict[str, Any] = source.config

    def names(self) -> list[str]:
        return self.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(name)

    def read(self, name: str) -> Tensor:
        return self.source.read(name)

    def file_spans(self, name: str) -> list[FileSpan]:
        return self.source.file_spans(name) if isinstance(self.source, HasFileSpans) else []

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.source.tokenizer()

    def copy_model_files(self, folder: Path) -> None:
        self.source.copy_model_files(folder)
        if self.config is not self.source.config:
            write_json(folder / "config.json", self.config)


def opened(source: Source) -> Source:
    """Returns the source that was opened, without the views of it."""
    return opened(source.source) if isinstance(source, SourceView) else source


def folder_of(source: Source) -> Path | None:
    """Returns the folder of the files of a source, below any view of it; None for a .gguf file."""
    inner = opened(source)
    return inner.folder if isinstance(inner, HuggingFaceSource) else None
