"""Chooses the stored scales of a format with a codebook, with the codebook in the loop.

The compiled loops of `lqexport.kernels.vectors` compute on the host, wherever the weights are.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from lqexport.formats.codebook import Codebook
from lqexport.formats.codec import GridCodec
from lqexport.grids.grid import Numbers
from lqexport.kernels import cpu, vectors

CUTS = np.array((0.05, 0.2, 0.35, 0.5), np.float32)
"""Ranges that the search tries: the shares of a group's largest magnitude that are beyond the levels.

Eleven of them, from -0.05 to 0.5, gained nothing on linears of SmolLM2-135M."""


@cache
def book(codebook: Codebook, levels: bytes) -> vectors.Book:
    """Returns a codebook as the compiled loops take it; `levels` are the bytes of its float32 levels."""
    values = np.frombuffer(levels, np.float32)
    base, shift = values[codebook.vectors], np.float32(0)
    if codebook.lift:
        shift = (values[1] - values[0]) / 2
        base = base + shift
    columns = base.T
    pairs = [columns[i] * columns[j] for i in range(len(columns)) for j in range(i)]
    features = np.array([*columns, *columns**2, *pairs], np.float32)
    features = np.pad(features, ((0, -len(features) % 4), (0, 0)))
    base = np.ascontiguousarray(base, np.float32)
    return vectors.Book(codebook.vectors, base, features, values, codebook.even, codebook.lift, shift)


def stored(numbers: Numbers, group: int, block: slice) -> cpu.Stored:
    """Returns the stored numbers of a block of columns as views of the arrays, which a kernel changes in place."""
    form = numbers.format
    first, last = block.start // group, block.stop // group
    supers = numbers.supers.numpy()[:, first // form.span : last // form.span]
    subs = numbers.subs.numpy()[:, first:last]
    return cpu.Stored(
        True, supers, subs, form.span, form.low, form.high, np.float32(form.sign), *form.floats.fitted, form.step
    )


def search_vectors(codec: GridCodec, weights: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Returns real-valued scales [R, G], and by how much an error of each counts [R, G], on the weights' device.

    weights      float32 [R, C]
    importance   float32 [G, g], the importance of the columns of each group, with sum 1

    An error of a scale counts by the sum of importance * level^2 over the group.
    """
    assert codec.codebook is not None
    assert codec.levels is not None
    scale, square = torch.zeros(2, len(weights), len(importance))
    vectors.fit_groups(
        weights.cpu().contiguous().numpy(), importance.cpu().contiguous().numpy(), CUTS,
        book(codec.codebook, codec.levels.tobytes()), scale.numpy(), square.numpy(),
    )  # fmt: skip
    return scale.to(weights.device), square.to(weights.device)
