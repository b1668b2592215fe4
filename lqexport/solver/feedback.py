"""Finds the codes of one linear on a given grid: error feedback, then coordinate descent.

The loss of a row is (q - w) H (q - w)^T, the squared error of its output; H is the second moments of the linear's
inputs. Rows are independent of each other. The solver sees a grid, never a format's bytes.

Error feedback is GPTQ's (Frantar et al. 2022, eq. 2 and 3), with H^-1 = U^T U and U upper triangular. Column i is
rounded to its nearest grid value. Its error (w_i - q_i) / U_ii, times row i of U, is subtracted from the columns that
follow.

Tensors on the CPU go through `lqexport.kernels.cpu`, those on a GPU through the CUDA kernels if CuPy is installed, and
all others through `lqexport.solver.solve_torch`. All three do the same arithmetic.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from lqexport.grids.grid import TensorGrid, round_half
from lqexport.grids.sections import TensorSections
from lqexport.kernels import cuda
from lqexport.runtime.products import times_transposed
from lqexport.runtime.tiles import product, product_transposed, tiles
from lqexport.solver import solve_cpu, solve_cuda, solve_torch, solve_vectors
from lqexport.solver.cholesky import CholeskyFactor

FEEDBACK_BLOCK = 128
"""Columns that error feedback solves before it spreads their errors over all later columns."""
REFINE_BLOCK = 256
"""Columns that coordinate descent takes at once, about."""
ROUNDS = 3
"""Rounds over a block of columns in one sweep of coordinate descent.

A round costs little beside the product that a sweep takes to get the block's gradient."""
VECTOR_ROUNDS = 2
"""The same for formats with a codebook, whose rounds cost more."""
REFIT_ROWS = 64
"""Rows whose tables are refitted at once. It bounds the memory that the refit takes."""


def damped(hessian: Tensor, dampening: float) -> Tensor:
    """Returns H with `dampening` times the mean of its diagonal added to the diagonal.

    Columns whose input is always zero get it too, so they are rounded by themselves. A Hessian of zeros becomes the
    identity.
    """
    mean = hessian.diagonal().mean()
    matrix = hessian.clone()
    matrix.diagonal().add_(torch.where(mean > 0, dampening * mean, 1.0))
    return matrix


def layer_loss(difference: Tensor, hessian: Tensor) -> float:
    """Returns the sum over rows of d H d^T for `difference` [R, C], Q - W.

    It is the squared error of the outputs, summed over them, in the unit of H (such as squared error per token).
    """
    return sum(float((times_transposed(tile, hessian) * tile).sum()) for tile in tiles(difference))


def feedback(weights: Tensor, grid: TensorGrid | TensorSections, cholesky: CholeskyFactor) -> Tensor:
    """Returns codes uint8 [R, C] for float32 weights [R, C] by error feedback.

    Columns are solved in the order of the Cholesky factor; the result has them in the order of the weight matrix. With
    a codebook, the factor must keep the columns of a run together (`CholeskyFactor.keeps_together`).
    """
    remaining = weights[:, cholesky.order].contiguous()
    ordered = torch.empty_like(remaining, dtype=torch.uint8)
    for run, columns, run_grid in grid.runs(cholesky.order):
        assert run_grid.codebook is None or cholesky.keeps_together(run_grid.codebook.run)
        scale, offset = run_grid.per_group(len(weights))
        for start in range(run.start, run.stop, FEEDBACK_BLOCK):
            block = slice(start, min(start + FEEDBACK_BLOCK, run.stop))
            group_of_column = columns[block.start - run.start : block.stop - run.start] // run_grid.group
            upper = cholesky.rows(block)
            width = len(upper)
            ordered[:, block], errors = _feedback_block(
                remaining[:, block].contiguous(), upper[:, :width].contiguous(), scale[:, group_of_column].contiguous(),
                offset[:, group_of_column].contiguous(), run_grid,
            )  # fmt: skip
            remaining[:, block.stop :] -= product(errors, upper[:, width:])
    codes = torch.empty_like(ordered)
    codes[:, cholesky.order] = ordered
    return codes


def _feedback_block(
    weights: Tensor, upper: Tensor, scale: Tensor, offset: Tensor, grid: TensorGrid
) -> tuple[Tensor, Tensor]:
    """Returns codes uint8 [R, B] and errors float32 [R, B] of one block; its columns have the order of solving."""
    if grid.codebook is not None:
        return solve_vectors.feedback_block(weights, upper, scale, grid)
    return backend(weights).feedback_block(weights, upper, scale, offset, grid.levels, grid.uniform, grid.rounding)


def refine(
    weights: Tensor, hessian: Tensor, grid: TensorGrid, codes: Tensor, *, sweeps: int, refit: bool
) -> tuple[TensorGrid, Tensor]:
    """Returns a new grid and new codes after coordinate descent, which never raises the loss.

    weights   float32 [R, C]
    hessian   float32 [C, C], damped
    codes     uint8 [R, C]
    sweeps    how often every block of columns is visited, each time in ROUNDS rounds
    refit     whether stored scales and offsets, or the tables, move too
    """
    codes = codes.clone()
    values = grid.values(codes)
    difference = values - weights
    grid = replace(grid, scale=grid.scale and grid.scale.clone(), offset=grid.offset and grid.offset.clone())
    for _ in range(sweeps):
        if refit and grid.scale is None:
            grid, codes = refit_tables(product_transposed(difference, hessian), hessian, grid, codes)
            values = grid.values(codes)
            difference = values - weights
        for block in _blocks(grid):
            new, lines = values[:, block].contiguous(), hessian[block]
            gradient, square = product_transposed(difference, lines), lines[:, block].contiguous()
            if grid.codebook is None:
                backend(weights).refine_block(new, gradient, square, codes, grid, block, refit, ROUNDS)
            else:
                solve_vectors.refine_block(new, gradient, square, codes, grid, block, refit, VECTOR_ROUNDS)
            values[:, block] = new
            difference[:, block] = new - weights[:, block]
    return grid, codes


def refit_tables(gradient: Tensor, hessian: Tensor, grid: TensorGrid, codes: Tensor) -> tuple[TensorGrid, Tensor]:
    """Returns the grid with the best table of each row for fixed codes, rounded to float16, and the codes.

    The new table is c - (P^T H P)^-1 P^T g (LNQ's closed form: Kim et al. 2025, section 4). c [K] is the row's present
    table, g [C] its row of `gradient`, which is (Q - W) H, and P [C, K] is 1 where a column has a code, else 0. A row
    keeps its present table if the rounded new one does not lower the loss. If a new table has to be sorted, its codes
    are renumbered. docs/solver.md has a worked example ("The refit of a table").
    """
    count = grid.levels.shape[1]
    parts = []
    chunks = zip(*(rows.split(REFIT_ROWS) for rows in (grid.levels, gradient, codes)), strict=True)
    for levels, slope, row_codes in chunks:
        indicator = torch.nn.functional.one_hot(row_codes.long(), count).to(slope.dtype)  # [r, C, K]
        right = torch.einsum("rck,rc->rk", indicator, slope).double()
        matrix = backend(levels).table_products(hessian, row_codes, count)
        # A level that no code uses has only zeros in the matrix: the ridge keeps that level where it is.
        ridge = 1e-7 * matrix.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-30
        step = torch.linalg.solve(matrix + ridge * torch.eye(count, device=matrix.device), -right)
        new = round_half(levels + step)
        step = (new - levels).double()
        change = torch.einsum("rk,rkl,rl->r", step, matrix, step) + 2 * (right * step).sum(1)
        parts.append(torch.where(change[:, None] < 0, new, levels))
    return replace(grid, levels=torch.cat(parts)).ascending(codes)


def backend(tensor: Tensor) -> ModuleType:
    """Returns the module whose inner loops run on the tensor's device."""
    if tensor.device.type == "cpu":
        return solve_cpu
    return solve_cuda if cuda.usable(tensor.device) else solve_torch


def _blocks(grid: TensorGrid) -> list[slice]:
    """Returns slices of about REFINE_BLOCK columns that hold whole groups and whole superblocks."""
    spans = [numbers.format.span for numbers in (grid.scale, grid.offset) if numbers]
    unit = grid.group * max(spans, default=1) if spans else 1
    width = unit * max(1, REFINE_BLOCK // unit)
    return [slice(start, min(start + width, grid.columns)) for start in range(0, grid.columns, width)]
