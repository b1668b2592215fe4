"""What a report shows beside sums: one matrix's weights and grid, and single tokens in their context."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lqexport.errors import UserError
from lqexport.evaluation.evaluate import Worst
from lqexport.models.interface import Weights

BINS = 80
CONTEXT = 24
"""Tokens before one that are shown."""


@dataclass(frozen=True)
class MatrixView:
    """A matrix in the source and in the file.

    edges          of the histogram's bins
    source, file   weights in each
    row, levels    a row of the file, and the values in it
    """

    name: str
    codec: str
    edges: list[float]
    source: list[int]
    file: list[int]
    row: int
    levels: list[float]


@dataclass(frozen=True)
class InContext:
    """A token that came, the text before it, what both models put first, and KL(source || file) in nats."""

    before: str
    came: str
    source_says: str
    file_says: str
    kl: float


def matrix_view(export: Weights, source: Weights, name: str | None, codec: str) -> MatrixView | None:
    """The portrait of the matrix `name`, in the middle row of which levels are shown; None where there is no name.

    Raises UserError where the file or the source has no such matrix.
    """
    if name is None:
        return None
    if name not in export.names() or name not in source.names() or len(export.shape(name)) != 2:
        raise UserError(f"There is no matrix {name} to show; `lqexport inspect --verbose` lists the names.")
    original, written = (weights.read(name).float().numpy() for weights in (source, export))
    edges = np.histogram_bin_edges(original, BINS)
    counts = [np.histogram(values.clip(edges[0], edges[-1]), edges)[0].tolist() for values in (original, written)]
    row = len(written) // 2
    return MatrixView(name, codec, edges.tolist(), counts[0], counts[1], row, np.unique(written[row]).tolist())


def in_context(worst: list[Worst], windows: NDArray[np.int64], tokenizer: PreTrainedTokenizerBase) -> list[InContext]:
    """Tokens of `windows` as text."""

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids))

    found = []
    for token in worst:
        window = windows[token.window].tolist()
        before = text(window[max(0, token.position - CONTEXT) : token.position])
        came = text([window[token.position]])
        found.append(InContext(before, came, text([token.reference_top]), text([token.top]), token.kl))
    return found
