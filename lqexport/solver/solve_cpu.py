"""The solver's blocks on the CPU: tensors in, compiled kernels (`lqexport.kernels.cpu`), tensors out."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lqexport.grids.grid import Numbers, TensorGrid
from lqexport.kernels import cpu


def feedback_block(
    weights: Tensor, factor: Tensor, scale: Tensor, offset: Tensor, levels: Tensor, uniform: bool, half: bool
) -> tuple[Tensor, Tensor]:
    """Codes and errors [R, B] of one block; arguments as in `cpu.feedback_block`, `weights` changed in place."""
    codes, errors = torch.empty_like(weights, dtype=torch.uint8), torch.empty_like(weights)
    cpu.feedback_block(weights.numpy(), factor.numpy(), scale.numpy(), offset.numpy(), levels.numpy(), uniform,
                       half, codes.numpy(), errors.numpy())  # fmt: skip
    return codes, errors


def refine_block(
    values: Tensor, gradient: Tensor, hessian: Tensor, codes: Tensor, grid: TensorGrid, block: slice, refit: bool
) -> None:
    """One sweep over the columns of `block`; values [R, B], codes [R, C] and the grid's numbers change in place."""
    part = codes[:, block].contiguous()
    cpu.refine_block(
        values.numpy(), gradient.numpy(), hessian.numpy(), part.numpy(), grid.levels.numpy(), grid.uniform, grid.group,
        _stored(grid.scale, grid, block), _stored(grid.offset, grid, block), refit, grid.half,
    )  # fmt: skip
    codes[:, block] = part


def table_products(hessian: Tensor, codes: Tensor, count: int) -> Tensor:
    """P^T H P of each row, float64 [R, K, K], with P [C, K] the row's codes as indicators."""
    products = torch.zeros(len(codes), count, count, dtype=torch.float64)
    cpu.table_products(hessian.contiguous().numpy(), codes.contiguous().numpy(), products.numpy())
    return products


def _stored(numbers: Numbers | None, grid: TensorGrid, block: slice) -> cpu.Stored:
    """The block's stored numbers, as views of the grid's."""
    if numbers is None:
        return cpu.Stored(False, np.ones((1, 1), np.float32), np.ones((1, 1), np.int16), 1, 1, 1, np.float32(1), False)
    form = numbers.format
    first, last = block.start // grid.group, block.stop // grid.group
    supers = numbers.supers.numpy()[:, first // form.span : last // form.span]
    subs = numbers.subs.numpy()[:, first:last]
    return cpu.Stored(True, supers, subs, form.span, form.low, form.high, np.float32(form.sign), form.power)
