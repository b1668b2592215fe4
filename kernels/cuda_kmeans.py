"""Exact weighted k-means of every row on a GPU (kmeans.cu): what `kmeans` does, but for tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from lqexport.kernels import cuda

SOURCE, KERNEL = "kmeans.cu", "kmeans"
THREADS = 256
CHUNK = 1 << 21
"""Values that are processed at once. Each takes about 150 bytes with 16 centers."""


def weighted_kmeans(values: Tensor, weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Finds the `count` centers of each row that minimise sum_i weight_i (w_i - nearest center)^2.

    values [R, C]; weight [C] or [R, C], not negative. Returns the centers, float64 [R, count], ascending, and the
    minima, float64 [R].
    """
    rows = max(1, CHUNK // values.shape[1])
    chunks = zip(values.split(rows), weight.expand_as(values).split(rows), strict=True)
    results = [_centers(chunk.double(), chunk_weight.double(), count) for chunk, chunk_weight in chunks]
    return torch.cat([centers for centers, _ in results]), torch.cat([errors for _, errors in results])


def _centers(values: Tensor, weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
    rows, columns = values.shape
    ordered, order = values.sort(1)
    shift = ordered[:, columns // 2, None].clone()  # sums of distances from the median lose fewer digits
    ordered -= shift
    weight = weight.gather(1, order)
    terms = torch.stack((weight, weight * ordered, weight * ordered * ordered))
    sums = torch.nn.functional.pad(terms.cumsum(2), (1, 0))
    costs, centers = values.new_empty(rows, 2, columns + 1), values.new_empty(rows, count)
    splits = values.new_empty(rows, count, columns + 1, dtype=torch.int32)
    errors = values.new_empty(rows)
    arguments: list[cuda.Argument] = [ordered, sums, rows, columns, count, costs, splits, centers, errors]
    cuda.launch(SOURCE, KERNEL, rows, THREADS, arguments)
    return (centers + shift).sort(1).values, errors
