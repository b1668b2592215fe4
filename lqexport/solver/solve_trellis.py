"""Searches the walks of a linear for EXL3: error feedback by rows of tiles, then sweeps that solve each row again.

The solver works in the rotated basis (`lqexport.grids.rotation`): on X [C, R] under the second moments M [C, C] of its
inputs, both padded to multiples of 128. The loss of an error E = X - Q is tr(E^T M E).

Feedback is block LDL: M = L D L^T, with L unit lower triangular by blocks of 16, one row of tiles. Rows of tiles are
solved from the last to the first. The loss is the sum of e_i^T D_i e_i over the rows i, if row i aims at X_i plus the
sum of L_ji^T E_j over the rows j behind it. Within a tile the search takes the diagonal of D_i for D_i.

In a sweep each row of tiles aims at what is best for it with all others as they are, and keeps the tiles that lower the
loss.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from lqexport.formats.trellis import COLUMN, POSITIONS, ROW, SIDE, States, Trellis
from lqexport.kernels import cuda, cuda_trellis
from lqexport.kernels import trellis as kernel
from lqexport.runtime.products import times_transposed

PANEL = 128
"""Rows whose errors are spread at once over all rows before them."""
SEAMS = (POSITIONS // 2, 0)
"""The positions at which sweeps close the walks, in turn, so that none is closed where it was before."""


class Encoder:
    """Searches the walks of rows of tiles, on a GPU if the kernels run there, else on the host."""

    def __init__(self, trellis: Trellis) -> None:
        self._trellis = trellis
        self._form = kernel.form_of(trellis.table, trellis.new_bits)
        self._rooms = kernel.rooms_for(self._form, numba.get_num_threads())

    def nearest(self, target: Tensor, weights: Tensor, states: States, seam: int | None = None) -> Tensor:
        """Searches the walks nearest to a row of tiles, and returns their values [16, n].

        target    float32 [16, n]
        weights   [16], of each line's squared errors, above 0
        states    uint16 [n / 16, 256], written
        seam      the position at which the walks in `states` are closed again; None if there are none yet
        """
        # Farther beyond the values of the codebook, the costs of all states could be cut off at the same number.
        beyond, table = float(self._form.limit) / (2 * self._form.unit), self._trellis.table
        target = target.clamp(float(table.min()) - beyond, float(table.max()) + beyond)
        tiles = target.unflatten(1, (-1, SIDE)).transpose(0, 1)[:, ROW, COLUMN].contiguous()
        positions, form, closing = weights.float()[ROW], self._form, (seam or 0, seam is not None)
        if cuda.usable(target.device):
            cuda_trellis.search(tiles, positions, form, *closing, states)
        else:
            kernel.search(tiles.cpu().numpy(), positions.cpu().numpy(), form, *closing, self._rooms, states)
        values = torch.empty(len(states), SIDE, SIDE)
        values[:, ROW, COLUMN] = torch.from_numpy(self._trellis.table[states])
        return values.transpose(0, 1).flatten(1).to(target.device)


def feedback(aim: Tensor, moments: Tensor, encoder: Encoder) -> tuple[Tensor, States]:
    """Returns the values Q [C, R] of walks, and their states uint16 [C / 16, R / 16, 256].

    aim       X, float32 [C, R]
    moments   M, float64 [C, C], positive definite
    """
    lower, weights = block_ldl(moments)
    values, remaining = torch.zeros_like(aim), aim.clone()
    states = np.empty((len(aim) // SIDE, aim.shape[1] // SIDE, POSITIONS), np.uint16)
    for end in range(len(aim), 0, -PANEL):
        panel = slice(end - PANEL, end)
        errors = torch.zeros_like(aim[panel])
        for start in range(PANEL - SIDE, -1, -SIDE):
            row = slice(end - PANEL + start, end - PANEL + start + SIDE)
            target = remaining[row] + lower[panel, row].T @ errors
            values[row] = encoder.nearest(target, weights[row], states[row.start // SIDE])
            errors[start : start + SIDE] = aim[row] - values[row]
        remaining[: panel.start] += times_transposed(lower[panel, : panel.start].T, errors.T)
    return values, states


def block_ldl(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Returns L [C, C] with M = L D L^T, unit lower triangular by blocks of 16, and the diagonal of D [C], float32."""
    root = torch.linalg.cholesky(moments)
    blocks = torch.stack([root[start : start + SIDE, start : start + SIDE] for start in range(0, len(root), SIDE)])
    lower = root.unflatten(1, (-1, SIDE)).transpose(0, 1)
    lower = torch.linalg.solve_triangular(blocks, lower, upper=False, left=False).transpose(0, 1).flatten(1)
    return lower.float(), blocks.square().sum(2).flatten().float()


def sweep(aim: Tensor, moments: Tensor, values: Tensor, states: States, encoder: Encoder, seam: int) -> None:
    """Solves every row of tiles again. A tile that would raise the loss stays.

    aim, moments     as for `feedback`, float32
    values, states   what `feedback` returns; they change in place
    seam             the position at which walks are closed
    """
    for start in range(len(aim) - SIDE, -1, -SIDE):
        row = slice(start, start + SIDE)
        slope = times_transposed(moments[row], (aim - values).T)
        square, before = moments[row, row], values[row].clone()
        best = before + torch.linalg.solve(square.double(), slope.double()).float()
        tried = states[start // SIDE].copy()
        step = encoder.nearest(best, square.diagonal(), tried, seam) - before
        change = (step * (square @ step - 2 * slope)).unflatten(1, (-1, SIDE)).sum((0, 2))
        better = change < 0
        values[row] = before + torch.where(better.repeat_interleave(SIDE), step, 0.0)
        taken = better.cpu().numpy()
        states[start // SIDE, taken] = tried[taken]
