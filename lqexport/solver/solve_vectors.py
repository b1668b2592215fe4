"""The solver's inner loops for formats with a codebook: passes torch tensors to `lqexport.kernels.vectors`.

The compiled loops compute on the host, wherever the tensors are.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lqexport.formats.codebook import EIGHT
from lqexport.grids.grid import Numbers, TensorGrid
from lqexport.grids.vectors import book, stored
from lqexport.kernels import vectors


def feedback_block(weights: Tensor, upper: Tensor, scale: Tensor, grid: TensorGrid) -> tuple[Tensor, Tensor]:
    """Returns codes uint8 [R, B] and errors float32 [R, B] of one block of columns, solved eight by eight.

    weights   float32 [R, B] in solve order, of which each eight are consecutive columns of the matrix
    upper     float32 [B, B], the block's part of U
    scale     float32 [R, B], of each column
    """
    runs = range(0, len(upper), EIGHT)
    diagonal = torch.stack([upper[start : start + EIGHT, start : start + EIGHT] for start in runs]).cpu().double()
    inverse = torch.linalg.inv(diagonal)
    metric = (inverse @ inverse.mT).float()
    weight = metric.diagonal(dim1=1, dim2=2).flatten()
    rows = weights.cpu().clone()
    codes, errors = torch.empty_like(rows, dtype=torch.uint8), torch.empty_like(rows)
    vectors.feedback_block(
        rows.numpy(), _host(upper), _host(metric), _host(weight), _host(inverse.float()), _host(scale[:, ::EIGHT]),
        book_of(grid), codes.numpy(), errors.numpy(),
    )  # fmt: skip
    return codes.to(weights.device), errors.to(weights.device)


def refine_block(
    values: Tensor, gradient: Tensor, hessian: Tensor, codes: Tensor, grid: TensorGrid, block: slice, refit: bool,
    rounds: int,
) -> None:  # fmt: skip
    """Makes rounds of coordinate descent over the columns of `block`.

    `values` [R, B], `gradient` [R, B], `codes` [R, C] and the grid's stored numbers change in place.
    """
    assert grid.scale is not None
    block_codes = codes[:, block].cpu().contiguous()
    numbers = Numbers(grid.scale.format, grid.scale.supers.cpu(), grid.scale.subs.cpu())
    new, slope = values.cpu(), gradient.cpu()
    for _ in range(rounds):
        vectors.refine_block(
            new.numpy(), slope.numpy(), hessian.cpu().numpy(), block_codes.numpy(), grid.group,
            stored(numbers, grid.group, block), refit, book_of(grid),
        )  # fmt: skip
    codes[:, block] = block_codes.to(codes.device)
    changed = ((values, new), (gradient, slope), (grid.scale.supers, numbers.supers), (grid.scale.subs, numbers.subs))
    for kept, host in changed:
        kept.copy_(host)


def _host(tensor: Tensor) -> NDArray[np.float32]:
    """Returns a tensor as a contiguous array on the host."""
    return np.asarray(tensor.cpu().contiguous().numpy())


def book_of(grid: TensorGrid) -> vectors.Book:
    """Returns the grid's codebook as the compiled loops take it."""
    assert grid.codebook is not None
    return book(grid.codebook, grid.levels[0].cpu().numpy().tobytes())
