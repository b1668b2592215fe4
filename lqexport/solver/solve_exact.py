"""LeanQuant-Exact: solves each row in an order of its own, that of Optimal Brain Quantization, on its own table.

It takes the place of error feedback, which solves all rows in one order. The time of a row grows with the cube of its
columns, so it is for models of millions of parameters. The inner loop is in `lqexport.kernels.exact`.
"""

from __future__ import annotations

from collections.abc import Iterable

import numba
import torch
from torch import Tensor

from lqexport.converters.plan import PlannedTensor
from lqexport.errors import UserError
from lqexport.grids.grid import TensorGrid
from lqexport.kernels.exact import solve_rows
from lqexport.solver.cholesky import CholeskyFactor

SECONDS = 3e-11
"""Seconds for one row on one core, over the cube of its columns. Measured: 2.6e-11 at 384 columns, 1.9e-11 at 1536."""
MOST_HOURS = 24
"""A run that is estimated to take more hours is refused."""


def in_own_order(weights: Tensor, grid: TensorGrid, cholesky: CholeskyFactor) -> Tensor:
    """Returns codes uint8 [R, C] for float32 weights [R, C] on a table per row, each row solved in its own order.

    The tensors may be on any device; the CPU computes.
    """
    codes = torch.zeros_like(weights, dtype=torch.uint8, device="cpu")
    solve_rows(
        weights.cpu().numpy().copy(), _inverse(cholesky).cpu().numpy(), grid.levels.cpu().numpy(), codes.numpy(),
        numba.get_num_threads(),
    )  # fmt: skip
    return codes.to(weights.device)


def _inverse(cholesky: CholeskyFactor) -> Tensor:
    """Returns the inverse of the damped Hessian, float32 [C, C], its columns in the order of the weight matrix."""
    columns = len(cholesky.order)
    padded = [torch.nn.functional.pad(panel.to(cholesky.order.device), (0, 0, 0, columns - len(panel)))
              for panel in cholesky.panels]  # fmt: skip
    upper = torch.cat(padded, dim=1)
    inverse = torch.empty_like(upper, dtype=torch.float32)
    inverse[cholesky.order[:, None], cholesky.order] = (upper.T @ upper).float()
    return inverse


def check_exact(linears: Iterable[PlannedTensor]) -> None:
    """Raises UserError if a linear has no table per row, or if solving all would take more than `MOST_HOURS` hours."""
    hours = 0.0
    for tensor in linears:
        if not tensor.codec_name.startswith("native:table-"):
            raise UserError(
                f"The solver exact needs a table per row, and {tensor.name} is to be in {tensor.codec_name}: take a "
                "target such as native:table-4, or --solver blocked."
            )
        rows, columns = tensor.matrix
        hours += SECONDS * rows * columns**3 / numba.get_num_threads() / 3600
    if hours > MOST_HOURS:
        raise UserError(
            f"The solver exact would take about {hours:.0f} hours on {numba.get_num_threads()} threads, and "
            f"{MOST_HOURS} is the limit. It is for models of millions of parameters: take --solver blocked."
        )
