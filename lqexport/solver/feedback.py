"""Finding the codes of one linear inside a fixed format: error feedback, then coordinate descent.

The loss of a row is (q - w) H (q - w)^T, H the second moments of the linear's inputs: the squared error of its output.
Rows are independent. The solver sees a grid, never a format's bytes.

Error feedback is GPTQ's (Frantar et al. 2022, eq. 2 and 3): with H^-1 = U^T U, U upper triangular, column i is rounded
to its nearest grid value and the error (w_i - q_i) / U_ii is spread over the columns that follow by U's row i.

CPU tensors go through `lqexport.kernels.cpu`, those on a GPU through the CUDA kernels where CuPy is installed, all
others through `lqexport.solver.solve_torch`. All do the same arithmetic.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from lqexport.grids.grid import TensorGrid
from lqexport.grids.sections import TensorSections
from lqexport.kernels import cuda
from lqexport.runtime.tiles import product, tiles
from lqexport.solver import solve_cpu, solve_cuda, solve_torch
from lqexport.solver.cholesky import CholeskyFactor

FEEDBACK_BLOCK = 128
REFINE_BLOCK = 256
REFIT_ROWS = 64
"""Rows whose tables are refitted at once; bounds the memory that takes."""


def damped(hessian: Tensor, dampening: float) -> Tensor:
    """H plus `dampening` times its mean diagonal on the diagonal. Columns whose input is always zero get it too, so
    they are rounded by themselves; a Hessian of zeros becomes the identity."""
    mean = hessian.diagonal().mean()
    matrix = hessian.clone()
    matrix.diagonal().add_(torch.where(mean > 0, dampening * mean, 1.0))
    return matrix


def layer_loss(difference: Tensor, hessian: Tensor) -> float:
    """Sum over rows of d H d^T for d [R, C] = Q - W: the summed squared error of the outputs, per unit of H."""
    return sum(float(((tile @ hessian) * tile).sum()) for tile in tiles(difference))


def feedback(weights: Tensor, grid: TensorGrid | TensorSections, cholesky: CholeskyFactor) -> Tensor:
    """Codes uint8 [R, C] by error feedback through float32 weights [R, C] in the factor's order."""
    remaining = weights[:, cholesky.order].contiguous()
    ordered = torch.empty_like(remaining, dtype=torch.uint8)
    for run, columns, part in grid.runs(cholesky.order):
        scale, offset = part.per_group(len(weights))
        for start in range(run.start, run.stop, FEEDBACK_BLOCK):
            block = slice(start, min(start + FEEDBACK_BLOCK, run.stop))
            spread = columns[block.start - run.start : block.stop - run.start] // part.group
            upper = cholesky.rows(block)
            width = len(upper)
            ordered[:, block], errors = backend(weights).feedback_block(
                remaining[:, block].contiguous(), upper[:, :width].contiguous(), scale[:, spread].contiguous(),
                offset[:, spread].contiguous(), part.levels, part.uniform, part.half,
            )  # fmt: skip
            remaining[:, block.stop :] -= product(errors, upper[:, width:])
    codes = torch.empty_like(ordered)
    codes[:, cholesky.order] = ordered
    return codes


def refine(
    weights: Tensor, hessian: Tensor, grid: TensorGrid, codes: Tensor, *, sweeps: int, refit: bool
) -> tuple[TensorGrid, Tensor]:
    """Coordinate descent over codes, and over the stored scales and offsets or the tables where `refit`; never raises
    the loss.

    weights float32 [R, C], hessian float32 [C, C] (damped), codes uint8 [R, C]. Returns a new grid and new codes.
    """
    codes = codes.clone()
    values = grid.values(codes)
    grid = replace(grid, scale=grid.scale and grid.scale.clone(), offset=grid.offset and grid.offset.clone())
    gradient = product(values - weights, hessian)
    for _ in range(sweeps):
        if refit and grid.scale is None:
            grid, codes = refit_tables(gradient, hessian, grid, codes)
            values = grid.values(codes)
            gradient = product(values - weights, hessian)
        for block in _blocks(grid):
            part = values[:, block].contiguous()
            backend(weights).refine_block(
                part, gradient[:, block].contiguous(), hessian[block, block].contiguous(), codes, grid, block, refit
            )
            gradient += product(part - values[:, block], hessian[block])
            values[:, block] = part
    return grid, codes


def refit_tables(gradient: Tensor, hessian: Tensor, grid: TensorGrid, codes: Tensor) -> tuple[TensorGrid, Tensor]:
    """The best table of each row for fixed codes, as float16: c - (P^T H P)^-1 P^T g for the table c, with P [C, K] the
    row's codes as indicators and g [C] its gradient (LNQ's closed form: Kim et al. 2025, section 4). A row whose
    rounded table would not lower the loss keeps its own. Codes follow where a table must be sorted anew.
    """
    count = grid.levels.shape[1]
    parts = []
    for levels, slope, code in zip(*(part.split(REFIT_ROWS) for part in (grid.levels, gradient, codes)), strict=True):
        indicator = torch.nn.functional.one_hot(code.long(), count).to(slope.dtype)  # [r, C, K]
        right = torch.einsum("rck,rc->rk", indicator, slope).double()
        matrix = backend(levels).table_products(hessian, code, count)
        # A level that no code uses has no row in the matrix: the ridge keeps it where it is.
        ridge = 1e-7 * matrix.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-30
        step = torch.linalg.solve(matrix + ridge * torch.eye(count, device=matrix.device), -right)
        new = (levels + step).clamp(-65504, 65504).half().float()
        step = (new - levels).double()
        change = torch.einsum("rk,rkl,rl->r", step, matrix, step) + 2 * (right * step).sum(1)
        parts.append(torch.where(change[:, None] < 0, new, levels))
    return replace(grid, levels=torch.cat(parts)).ascending(codes)


def backend(tensor: Tensor) -> ModuleType:
    """Where the solver's blocks run."""
    if tensor.device.type == "cpu":
        return solve_cpu
    return solve_cuda if cuda.usable(tensor.device) else solve_torch


def _blocks(grid: TensorGrid) -> list[slice]:
    """Runs of columns that no scale crosses, about REFINE_BLOCK wide."""
    spans = [numbers.format.span for numbers in (grid.scale, grid.offset) if numbers]
    unit = grid.group * max(spans, default=1) if spans else 1
    width = unit * max(1, REFINE_BLOCK // unit)
    return [slice(start, min(start + width, grid.columns)) for start in range(0, grid.columns, width)]
