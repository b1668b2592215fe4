"""Opens a model to run it, whether it is a source or a written file: what takes any of them opens it here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lqexport.models.adapters import corrected, open_factors
from lqexport.models.interface import Weights
from lqexport.models.source import open_source
from lqexport.models.tokenizers import tokenizer_of
from lqexport.models.written import is_written, open_export

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class AnyModel:
    """A model that can be run.

    name        what it was opened by
    weights     its weights; the low-rank corrections of a written model are added to them
    tokenizer   returns its tokenizer; raises UserError if there is none or it cannot be loaded
    """

    name: str
    weights: Weights
    tokenizer: Callable[[], PreTrainedTokenizerBase]


def open_model(name: str | Path) -> AnyModel:
    """Opens a .gguf file, a folder that an lqexport command wrote, an artifact, or a Hugging Face folder or hub id.

    Raises UserError if there is no such model, or it cannot be read.
    """
    name, path = str(name), Path(name)
    if not is_written(path):
        source = open_source(name)
        return AnyModel(name, source, source.tokenizer)
    export = open_export(path)
    return AnyModel(name, corrected(export, open_factors(path, None, export.config)), partial(tokenizer_of, path))
