"""Sources whose value heads are columns: in the order of transformers, or in that of llama.cpp.

Rows are put into llama.cpp's order when a file is written. Columns are quantized in blocks that may span heads, so
they are put into it before (`converters/models/value_heads.py`).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lqexport.converters.models.architecture import Config
from lqexport.converters.models.architectures import find_architecture
from lqexport.converters.models.value_heads import TILED, tiled_columns
from lqexport.models.joined import joined
from lqexport.models.latent import cut_like, for_drafts
from lqexport.models.source import Source, open_source
from lqexport.models.source_view import SourceView
from lqexport.recipe import Recipe


class Reordered(SourceView):
    """A source whose `tiled` linears have their columns in llama.cpp's order, where the source has transformers'.

    Or the other way round. Its config says in which order they are.
    """

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        architecture = find_architecture(source.config)
        assert architecture is not None
        self._architecture, self._tiled = architecture, not source.config.get(TILED)
        self.config = source.config | {TILED: self._tiled}

    def moves(self, name: str) -> bool:
        """Returns whether the columns of a tensor change places."""
        return tiled_columns(self._architecture, self.config, name, self.shape(name)[-1]) is not None

    def read(self, name: str) -> Tensor:
        values = self.source.read(name)
        order = tiled_columns(self._architecture, self.config, name, values.shape[-1])
        if order is None:
            return values
        return values[..., torch.from_numpy(order if self._tiled else np.argsort(order))]


def in_order(source: Source, tiled: bool) -> Source:
    """Returns the source with the columns of `tiled` linears in llama.cpp's order, or in transformers'."""
    architecture = find_architecture(source.config)
    if architecture is None or not architecture.tiled or bool(source.config.get(TILED)) == tiled:
        return source
    return Reordered(source)


def source_like(source: Source, config: Config) -> Source:
    """Returns the source as a written file with this config has it: the order of columns, cut and joined linears."""
    return in_order(joined(cut_like(source, config)), bool(config.get(TILED)))


def source_of(recipe: Recipe) -> Source:
    """Opens the source of a recipe as the files of its target have it: the order of columns, cut and joined linears.

    Raises UserError as `open_source`.
    """
    source, for_gguf = open_source(recipe.source), recipe.parsed_target.family == "gguf"
    return in_order(joined(for_drafts(source)) if for_gguf and recipe.mtp else source, for_gguf)
