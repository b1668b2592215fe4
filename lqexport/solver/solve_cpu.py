"""The solver's inner loops on the CPU: passes torch tensors to the compiled kernels of `lqexport.kernels.cpu`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from lqexport.formats.codec import FLOAT16, Rounding
from lqexport.grids.grid import Numbers, TensorGrid
from lqexport.kernels import cpu, refine

SPREAD_ROWS = 256
"""Rows whose `spread` is computed at once (`kernels.refine.refine_block`). It bounds the memory that this takes.

The last bits depend on it. It divides ROW_TILE, so that whole tiles have whole parts."""


def feedback_block(
    weights: Tensor, upper: Tensor, scale: Tensor, offset: Tensor, levels: Tensor, uniform: bool, rounding: Rounding
) -> tuple[Tensor, Tensor]:
    """Returns codes uint8 [R, B] and errors float32 [R, B] of one block of columns, solved in turn.

    The arguments are those of `kernels.cpu.feedback_block`; `upper` [B, B] is the block's part of U. `weights` change
    in place.
    """
    codes, errors = torch.empty_like(weights, dtype=torch.uint8), torch.empty_like(weights)
    cpu.feedback_block(weights.numpy(), upper.numpy(), scale.numpy(), offset.numpy(), levels.numpy(), uniform,
                       int(rounding), codes.numpy(), errors.numpy())  # fmt: skip
    return codes, errors


def refine_block(
    values: Tensor, gradient: Tensor, hessian: Tensor, codes: Tensor, grid: TensorGrid, block: slice, refit: bool,
    rounds: int,
) -> None:  # fmt: skip
    """Makes rounds of coordinate descent over the columns of `block`.

    `values` [R, B], `gradient` [R, B], `codes` [R, C] and the grid's stored numbers change in place.
    """
    group, refit = min(grid.group, values.shape[1]), refit and grid.scale is not None
    block_codes, lines = codes[:, block].contiguous(), hessian.unflatten(0, (-1, group))
    with stored(grid.scale, grid.group, block) as scale, stored(grid.offset, grid.group, block) as offset:
        for start in range(0, len(values), SPREAD_ROWS):
            rows = slice(start, start + SPREAD_ROWS)
            levels = grid.levels if len(grid.levels) == 1 else grid.levels[rows]
            part = block_codes[rows]
            spread = _spread(grid.level_of(part), lines) if refit else torch.empty(len(part), *lines.shape[::2])
            refine.refine_block(
                values[rows].numpy(), gradient[rows].numpy(), hessian.numpy(), part.numpy(), levels.numpy(),
                grid.uniform, spread.numpy(), _rows_of(scale, rows), _rows_of(offset, rows), refit, int(grid.rounding),
                rounds,
            )  # fmt: skip
    codes[:, block] = block_codes


def table_products(hessian: Tensor, codes: Tensor, count: int) -> Tensor:
    """Returns P^T H P for each row, float64 [R, K, K]; P [C, K] is 1 where a column has a code, else 0."""
    products = torch.zeros(len(codes), count, count, dtype=torch.float64)
    cpu.table_products(hessian.contiguous().numpy(), codes.contiguous().numpy(), products.numpy())
    return products


def _spread(level: Tensor, lines: Tensor) -> Tensor:
    """Returns the sums of level_i H_i over the columns i of each group, [R, G, B].

    level   [R, B], the level of each code
    lines   [G, g, B], the block's Hessian by groups of its rows
    """
    by_group = level.unflatten(1, lines.shape[:2]).transpose(0, 1)
    return torch.bmm(by_group, lines).transpose(0, 1).contiguous()


def _rows_of(stored: cpu.Stored, rows: slice) -> cpu.Stored:
    """Returns some rows of a block's stored numbers, as views."""
    return stored._replace(supers=stored.supers[rows], subs=stored.subs[rows]) if stored.present else stored


@contextmanager
def stored(numbers: Numbers | None, group: int, block: slice) -> Iterator[cpu.Stored]:
    """Yields the stored numbers of a block of columns, which a kernel changes in place; then they are the grid's, too.

    The arrays are contiguous, and not slices of the grid's: a kernel is compiled for each layout that it gets. Without
    numbers, a kernel gets some that it does not look at.
    """
    if numbers is None:
        supers, subs = np.ones((1, 1), np.float32), np.ones((1, 1), np.int16)
        yield cpu.Stored(False, supers, subs, 1, 1, 1, np.float32(1), *FLOAT16, 1)
        return
    form = numbers.format
    first, last = block.start // group, block.stop // group
    supers = numbers.supers.numpy()[:, first // form.span : last // form.span]
    subs = numbers.subs.numpy()[:, first:last]
    held = cpu.Stored(
        True, np.ascontiguousarray(supers), np.ascontiguousarray(subs), form.span, form.low, form.high,
        np.float32(form.sign), *form.floats.fitted, form.step,
    )  # fmt: skip
    yield held
    supers[:], subs[:] = held.supers, held.subs
