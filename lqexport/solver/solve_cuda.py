"""The solver's inner loops on a GPU, in the CUDA kernels of `lqexport.kernels.cuda_solve`.

The functions are those of `lqexport.solver.solve_cpu`, with the same arguments and results.
"""

from __future__ import annotations

from torch import Tensor

from lqexport.formats.codec import Rounding
from lqexport.grids.grid import Numbers, TensorGrid
from lqexport.kernels import cuda_solve
from lqexport.solver.solve_torch import table_products

__all__ = ["feedback_block", "refine_block", "table_products"]


def feedback_block(
    weights: Tensor, upper: Tensor, scale: Tensor, offset: Tensor, levels: Tensor, uniform: bool, rounding: Rounding
) -> tuple[Tensor, Tensor]:
    """Returns codes uint8 [R, B] and errors float32 [R, B] of one block of columns, solved in turn.

    The arguments are those of `kernels.cpu.feedback_block`; `upper` [B, B] is the block's part of U. `weights` change
    in place.
    """
    return cuda_solve.feedback_block(weights, upper, scale, offset, levels, uniform, int(rounding))


def refine_block(
    values: Tensor, gradient: Tensor, hessian: Tensor, codes: Tensor, grid: TensorGrid, block: slice, refit: bool,
    rounds: int,
) -> None:  # fmt: skip
    """Makes rounds of coordinate descent over the columns of `block`.

    `values` [R, B], `gradient` [R, B], `codes` [R, C] and the grid's stored numbers change in place.
    """
    block_codes = codes[:, block].contiguous()
    # The kernel needs contiguous rows, and a slice of the grid's numbers has none: it works on copies.
    scale, offset = stored(grid.scale, grid, block), stored(grid.offset, grid, block)
    group = min(grid.group, values.shape[1])  # a table has no groups: any width that divides the block is right
    cuda_solve.refine_block(
        values,
        gradient,
        hessian,
        block_codes,
        grid.levels,
        grid.uniform,
        group,
        scale,
        offset,
        refit,
        int(grid.rounding),
        rounds,
    )
    codes[:, block] = block_codes
    keep(grid.scale, scale, grid, block)
    keep(grid.offset, offset, grid, block)


def _slices(numbers: Numbers, grid: TensorGrid, block: slice) -> tuple[slice, slice]:
    """Returns the slices of the grid's supers and subs (their columns) that belong to a block of columns."""
    first, last = block.start // grid.group, block.stop // grid.group
    return slice(first // numbers.format.span, last // numbers.format.span), slice(first, last)


def stored(numbers: Numbers | None, grid: TensorGrid, block: slice) -> cuda_solve.Stored:
    """Returns copies of the stored numbers of a block of columns, which a kernel changes."""
    if numbers is None:
        return cuda_solve.Stored()
    form, (supers, subs) = numbers.format, _slices(numbers, grid, block)
    copies = numbers.supers[:, supers].contiguous(), numbers.subs[:, subs].contiguous()
    return cuda_solve.Stored(*copies, form.span, form.low, form.high, form.sign, form.floats.fitted, form.step)


def keep(numbers: Numbers | None, changed: cuda_solve.Stored, grid: TensorGrid, block: slice) -> None:
    """Writes the stored numbers that a kernel has changed into the grid's."""
    if numbers is not None and changed.supers is not None and changed.subs is not None:
        supers, subs = _slices(numbers, grid, block)
        numbers.supers[:, supers] = changed.supers
        numbers.subs[:, subs] = changed.subs
