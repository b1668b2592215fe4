"""The choice of EXL2's scale codes on a GPU (squared.cu): what `squared` does, but for tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from lqexport.kernels import cuda, squared

SOURCE, KERNEL = "squared.cu", "best_subs"
THREADS = 128


def best_subs(weights: Tensor, weight: Tensor, scales: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Returns the least error, float32 [R, M], of every row and maximum, and its scale code, int16 [R, M].

    `squared.best_subs` describes the arguments.
    """
    rows, count = len(weights), len(scales)
    errors = weights.new_empty(rows, count)
    subs = torch.empty_like(errors, dtype=torch.int16)
    arguments: list[cuda.Argument] = [
        weights, weight, scales, low, high, squared.NARROW, squared.WIDE, rows, weights.shape[1], count, errors, subs,
    ]  # fmt: skip
    cuda.launch(SOURCE, KERNEL, -(-rows * count // THREADS), THREADS, arguments)
    return errors, subs
