"""LeanQuant-Exact: in the place of error feedback in one order for all rows, each row in the order of Optimal Brain
Quantization, on its own table. For models of millions of parameters: the time of a row grows with the cube of its
columns. The work is in `lqexport.kernels.exact`.
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
"""Per row and cube of its columns on one core: measured at 384 and 1536 columns, 2.6e-11 and 1.9e-11."""
MOST_HOURS = 24


def in_own_order(weights: Tensor, grid: TensorGrid, cholesky: CholeskyFactor) -> Tensor:
    """Codes uint8 [R, C] for float32 weights [R, C] on a table per row, each row in its own order. Computed on the CPU,
    on whatever device the tensors are."""
    codes = torch.zeros_like(weights, dtype=torch.uint8, device="cpu")
    solve_rows(
        weights.cpu().numpy().copy(), _inverse(cholesky).cpu().numpy(), grid.levels.cpu().numpy(), codes.numpy(),
        numba.get_num_threads(),
    )  # fmt: skip
    return codes.to(weights.device)


def _inverse(cholesky: CholeskyFactor) -> Tensor:
    """The inverse of the damped second moments, float32 [C, C], columns in their own order."""
    columns = len(cholesky.order)
    padded = [torch.nn.functional.pad(panel.to(cholesky.order.device), (0, 0, 0, columns - len(panel)))
              for panel in cholesky.panels]  # fmt: skip
    upper = torch.cat(padded, dim=1)
    inverse = torch.empty_like(upper, dtype=torch.float32)
    inverse[cholesky.order[:, None], cholesky.order] = (upper.T @ upper).float()
    return inverse


def check_exact(linears: Iterable[PlannedTensor]) -> None:
    """Raises UserError where a linear has no table per row, or where solving all of them would take too long."""
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
