"""The solver's inner loops for formats with a codebook, by the CUDA kernels or by `lqexport.kernels.vectors`.

Where the tensors are on a GPU without CuPy, the compiled loops compute on the host. The small matrices of each eight
columns are always computed there, in float64.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lqexport.formats.codebook import EIGHT, Codebook
from lqexport.grids.grid import Numbers, TensorGrid
from lqexport.grids.vectors import book, book_on
from lqexport.kernels import cuda, cuda_vectors, vectors
from lqexport.solver import solve_cpu, solve_cuda


def feedback_block(weights: Tensor, upper: Tensor, scale: Tensor, grid: TensorGrid) -> tuple[Tensor, Tensor]:
    """Returns codes uint8 [R, B] and errors float32 [R, B] of one block of columns, solved eight by eight.

    weights   float32 [R, B] in solve order, of which each eight are consecutive columns of the matrix
    upper     float32 [B, B], the block's part of U
    scale     float32 [R, B], of each column
    """
    inverse = torch.linalg.inv(squares(upper))
    metric, scales = inverse @ inverse.mT, scale[:, ::EIGHT].contiguous()
    weight = metric.float().diagonal(dim1=1, dim2=2).flatten()
    metrics, inverse = metrics_of(metric, grid), inverse.float().contiguous()
    if cuda.usable(weights.device):
        device = weights.device
        return cuda_vectors.feedback_block(
            weights, upper, metrics.to(device), weight.to(device), inverse.to(device), scales,
            book_on(device, *_key(grid)),
        )  # fmt: skip
    rows = weights.cpu().clone()
    codes, errors = torch.empty_like(rows, dtype=torch.uint8), torch.empty_like(rows)
    vectors.feedback_block(
        rows.numpy(), _host(upper), metrics.numpy(), weight.numpy(), inverse.numpy(), _host(scales),
        book(*_key(grid)), codes.numpy(), errors.numpy(),
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
    metrics = metrics_of(squares(hessian), grid)
    if cuda.usable(values.device):
        _refine_on_device(values, gradient, hessian, metrics, codes, grid, block, refit, rounds)
        return
    block_codes = codes[:, block].cpu().contiguous()
    numbers = Numbers(grid.scale.format, grid.scale.supers.cpu(), grid.scale.subs.cpu())
    new, slope = values.cpu(), gradient.cpu()
    with solve_cpu.stored(numbers, grid.group, block) as scale:
        for _ in range(rounds):
            vectors.refine_block(
                new.numpy(), slope.numpy(), _host(hessian), metrics.numpy(), block_codes.numpy(), grid.group, scale,
                refit, book(*_key(grid)),
            )  # fmt: skip
    codes[:, block] = block_codes.to(codes.device)
    changed = ((values, new), (gradient, slope), (grid.scale.supers, numbers.supers), (grid.scale.subs, numbers.subs))
    for kept, host in changed:
        kept.copy_(host)


def _refine_on_device(
    values: Tensor, gradient: Tensor, hessian: Tensor, metrics: Tensor, codes: Tensor, grid: TensorGrid, block: slice,
    refit: bool, rounds: int,
) -> None:  # fmt: skip
    """Does what `refine_block` does by the CUDA kernel."""
    block_codes, scale = codes[:, block].contiguous(), solve_cuda.stored(grid.scale, grid, block)
    cuda_vectors.refine_block(
        values, gradient, hessian, metrics.to(values.device), block_codes, grid.group, scale, refit, rounds,
        book_on(values.device, *_key(grid)),
    )  # fmt: skip
    codes[:, block] = block_codes
    solve_cuda.keep(grid.scale, scale, grid, block)


def squares(matrix: Tensor) -> Tensor:
    """Returns the blocks of eight columns on a matrix's diagonal, float64 [n, 8, 8], on the host."""
    runs = range(0, len(matrix), EIGHT)
    return torch.stack([matrix[start : start + EIGHT, start : start + EIGHT] for start in runs]).cpu().double()


def metrics_of(whole: Tensor, grid: TensorGrid) -> Tensor:
    """Returns the metrics float64 [n, 8, 8] of runs of eight columns as `vectors.feedback_block` takes them.

    A part that is not positive definite, but for rounding, gets the factor of its diagonal. Then the search is under
    the diagonal alone.
    """
    assert grid.codebook is not None
    width = grid.codebook.width
    parts = torch.stack([whole[:, i : i + width, i : i + width] for i in range(0, EIGHT, width)], 1)
    lower, failed = torch.linalg.cholesky_ex(parts.flip(-1, -2))
    diagonal = torch.diag_embed(parts.diagonal(dim1=-2, dim2=-1).clamp(min=1e-30).sqrt())
    factor = torch.where(failed[..., None, None] > 0, diagonal, lower.flip(-1, -2))
    reach = torch.linalg.solve_triangular(factor, torch.eye(width, dtype=factor.dtype), upper=True).mT
    places = torch.tensor([vectors.place.py_func(i, width) for i in range(width)])
    metrics = torch.zeros(len(whole), 1 + 2 * parts.shape[1], EIGHT, EIGHT)
    metrics[:, 0] = whole
    metrics[:, 1::2, places[:, None], places] = factor.float()
    metrics[:, 2::2, places[:, None], places] = reach.float()
    return metrics


def _host(tensor: Tensor) -> NDArray[np.float32]:
    """Returns a tensor as a contiguous array on the host."""
    return np.asarray(tensor.cpu().contiguous().numpy())


def _key(grid: TensorGrid) -> tuple[Codebook, bytes]:
    """Returns the grid's codebook, and the bytes of its levels."""
    assert grid.codebook is not None
    return grid.codebook, grid.levels[0].cpu().numpy().tobytes()
