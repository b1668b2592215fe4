"""The solver's blocks on a GPU: as `lqexport.solver.solve_cpu`, with the CUDA kernels (`lqexport.kernels.cuda_solve`)."""

from __future__ import annotations

from torch import Tensor

from lqexport.grids.grid import Numbers, TensorGrid
from lqexport.kernels import cuda_solve
from lqexport.solver.solve_torch import table_products

__all__ = ["feedback_block", "refine_block", "table_products"]


def feedback_block(
    weights: Tensor, factor: Tensor, scale: Tensor, offset: Tensor, levels: Tensor, uniform: bool, half: bool
) -> tuple[Tensor, Tensor]:
    """Codes and errors [R, B] of one block; arguments as in `cpu.feedback_block`, `weights` changed in place."""
    return cuda_solve.feedback_block(weights, factor, scale, offset, levels, uniform, half)


def refine_block(
    values: Tensor, gradient: Tensor, hessian: Tensor, codes: Tensor, grid: TensorGrid, block: slice, refit: bool
) -> None:
    """One sweep over the columns of `block`; values [R, B], codes [R, C] and the grid's numbers change in place."""
    part = codes[:, block].contiguous()
    # The kernel wants contiguous rows, which the block's part of the grid's numbers is not.
    scale, offset = _stored(grid.scale, grid, block), _stored(grid.offset, grid, block)
    group = min(grid.group, values.shape[1])  # a table has no groups: any width that divides the block will do
    cuda_solve.refine_block(
        values, gradient, hessian, part, grid.levels, grid.uniform, group, scale, offset, refit, grid.half
    )
    codes[:, block] = part
    for numbers, changed in ((grid.scale, scale), (grid.offset, offset)):
        if numbers is not None and changed.supers is not None and changed.subs is not None:
            supers, subs = _parts(numbers, grid, block)
            numbers.supers[:, supers] = changed.supers
            numbers.subs[:, subs] = changed.subs


def _parts(numbers: Numbers, grid: TensorGrid, block: slice) -> tuple[slice, slice]:
    """Where the block's supers and subs stand in a row of the grid's."""
    first, last = block.start // grid.group, block.stop // grid.group
    return slice(first // numbers.format.span, last // numbers.format.span), slice(first, last)


def _stored(numbers: Numbers | None, grid: TensorGrid, block: slice) -> cuda_solve.Stored:
    if numbers is None:
        return cuda_solve.Stored()
    form, (supers, subs) = numbers.format, _parts(numbers, grid, block)
    parts = numbers.supers[:, supers].contiguous(), numbers.subs[:, subs].contiguous()
    return cuda_solve.Stored(*parts, form.span, form.low, form.high, form.sign, form.power)
