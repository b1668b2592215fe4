"""Rounds tensors that no solver works on to the values of a codec: embeddings, norms, biases."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lqexport.formats.codec import GridCodec, PlainCodec, Planes, SectionedCodec, TrellisCodec, joined_planes
from lqexport.formats.plain import TooLarge
from lqexport.formats.registry import codec_named
from lqexport.grids.fit import fit
from lqexport.grids.whole import fitted_whole, in_units
from lqexport.solver.weight_checks import check_weights, too_large
from lqexport.storage.artifact import StoredTensor

ROUND_CHUNK = 1 << 24
"""Number of weights that are rounded at once. It bounds the memory that a large embedding needs."""


def round_tensor(name: str, weight: Tensor, codec_name: str) -> StoredTensor:
    """Returns a tensor with every weight rounded by itself to a value of the codec.

    `weight` has one or two dimensions and any float dtype. Raises UserError if a weight is NaN or infinite, or too
    large for the codec.
    """
    check_weights(name, weight, codec_name)
    codec = codec_named(codec_name)
    matrix = weight.reshape(1, -1) if weight.ndim == 1 else weight
    whole, chunks = fitted_whole(codec, weight), matrix.split(max(1, ROUND_CHUNK // matrix.shape[1]))
    try:
        parts = [_rounded(codec, part.float(), whole) for part in chunks]
    except TooLarge:
        raise too_large(name, weight, codec_name) from None
    return StoredTensor(name, codec_name, tuple(weight.shape), joined_planes(parts))


def _rounded(codec: PlainCodec | GridCodec | SectionedCodec | TrellisCodec, matrix: Tensor, whole: float) -> Planes:
    if isinstance(codec, PlainCodec):
        return codec.encode_values(matrix.cpu().numpy())
    assert isinstance(codec, GridCodec)  # no plan rounds a tensor to EXL2, EXL3 or GPTQ without solving it
    grid = fit(codec, in_units(matrix, whole), torch.ones(matrix.shape[1], device=matrix.device))
    grid = replace(grid, whole=whole)
    return codec.encode(grid.numpy(), grid.nearest(matrix).cpu().numpy())
