"""Details that a report shows: one matrix's weights and grid, and single tokens with the text before them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lqexport.errors import UserError
from lqexport.evaluation.evaluate import Worst
from lqexport.models.interface import Weights

BINS = 80
"""Bins of the histogram of a matrix's weights."""
CONTEXT = 24
"""How many tokens before a token are shown."""


@dataclass(frozen=True)
class MatrixView:
    """Histograms of one matrix's weights in the source and in the file, and the grid of one of its rows.

    codec          name of the codec that stores the matrix
    edges          edges of the histogram's bins, one more than there are bins
    source, file   number of the source's and of the file's weights in each bin
    row, levels    index of a row of the file, and the distinct values in it, ascending
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
    """One token of the evaluation text, and what both models predicted in its place.

    before        the text before the token
    came          the token that follows in the text
    source_says   the token that the source predicts
    file_says     the token that the file predicts
    kl            KL(source || file) in nats
    """

    before: str
    came: str
    source_says: str
    file_says: str
    kl: float


def check_shown(export: Weights, source: Weights, name: str) -> None:
    """Raises UserError if the file or the source has no matrix of this name."""
    if name not in export.names() or name not in source.names() or len(export.shape(name)) != 2:
        raise UserError(f"There is no matrix {name} to show; `lqexport inspect --verbose` lists the names.")


def matrix_view(export: Weights, source: Weights, name: str | None, codec_name: str) -> MatrixView | None:
    """Returns the histograms of the matrix `name` and the levels of its middle row; None if `name` is None.

    Weights of the file beyond the source's range count in the outermost bins. Both have the matrix (`check_shown`).
    """
    if name is None:
        return None
    original, written = (weights.read(name).float().numpy() for weights in (source, export))
    edges = np.histogram_bin_edges(original, BINS)
    counts = [np.histogram(values.clip(edges[0], edges[-1]), edges)[0].tolist() for values in (original, written)]
    row = len(written) // 2
    return MatrixView(name, codec_name, edges.tolist(), counts[0], counts[1], row, np.unique(written[row]).tolist())


def in_context(worst: list[Worst], windows: NDArray[np.int64], tokenizer: PreTrainedTokenizerBase) -> list[InContext]:
    """Returns the tokens that `worst` names, which lie in `windows`, as text with their context."""

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids))

    shown = []
    for token in worst:
        window = windows[token.window].tolist()
        before = text(window[max(0, token.position - CONTEXT) : token.position])
        came = text([window[token.position]])
        shown.append(InContext(before, came, text([token.reference_top]), text([token.top]), token.kl))
    return shown
