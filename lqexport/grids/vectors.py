"""Chooses the stored scales of a format with a codebook, with the codebook in the loop.

The search runs in the CUDA kernels where the weights are on a GPU that has them, else on the host.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from lqexport.formats.codebook import Codebook
from lqexport.formats.codec import GridCodec
from lqexport.kernels import cuda, cuda_vectors, vectors

CUTS = np.array((0.05, 0.2, 0.35, 0.5), np.float32)
"""Ranges that the search tries: the shares of a group's largest magnitude that are beyond the levels.

Eleven of them, from -0.05 to 0.5, gained nothing on linears of SmolLM2-135M."""


@cache
def book(codebook: Codebook, levels: bytes) -> vectors.Book:
    """Returns a codebook as the compiled loops take it; `levels` are the bytes of its float32 levels."""
    values = np.frombuffer(levels, np.float32)
    half, shift = codebook.width // 2, (values[1] - values[0]) / 2 if codebook.lift else np.float32(0)
    heads, head_of, counts = np.unique(codebook.vectors[:, :half], axis=0, return_inverse=True, return_counts=True)
    codes = codebook.vectors[np.argsort(head_of.ravel(), kind="stable")]
    halves = values[np.concatenate([heads, codes[:, half:]])].T + shift
    halves = np.ascontiguousarray(np.pad(halves, ((0, vectors.HALF - half), (0, 0))))
    starts = len(heads) + np.array([0, *counts.cumsum()], np.uint64)
    return vectors.Book(codes, halves, starts, values, codebook.even, codebook.lift, shift)


@cache
def book_on(device: torch.device, codebook: Codebook, levels: bytes) -> cuda_vectors.Book:
    """Returns a codebook as the CUDA kernels take it, on a device."""
    return cuda_vectors.on_device(book(codebook, levels), device)


def search_vectors(codec: GridCodec, weights: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Returns real-valued scales [R, G], and by how much an error of each counts [R, G], on the weights' device.

    weights      float32 [R, C]
    importance   float32 [G, g], the importance of the columns of each group, with sum 1

    An error of a scale counts by the sum of importance * level^2 over the group.
    """
    assert codec.codebook is not None
    assert codec.levels is not None
    weight, key = importance.contiguous().flatten(), (codec.codebook, codec.levels.tobytes())
    if cuda.usable(weights.device):
        cuts, groups = torch.from_numpy(CUTS).to(weights.device), len(importance)
        return cuda_vectors.fit_groups(weights.contiguous(), weight, cuts, groups, book_on(weights.device, *key))
    scale, square = torch.zeros(2, len(weights), len(importance))
    vectors.fit_groups(
        weights.cpu().contiguous().numpy(), weight.cpu().numpy(), CUTS, book(*key), scale.numpy(), square.numpy()
    )
    return scale.to(weights.device), square.to(weights.device)
