"""Computes the Cholesky factor that error feedback needs: U with H^-1 = U^T U for a damped Hessian H.

In a model of 70 billion weights H and U have 28672 columns, and a float64 matrix of that size is 6.6 GB. So neither H
in float64 nor its inverse is ever held whole. U is computed in panels of columns, one by one: a left-looking Cholesky
factorization, then the inverse in its place. Finished panels are kept on the device or elsewhere while the next one is
computed. The device always computes on contiguous copies, so the bits do not depend on where panels are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lqexport.errors import UserError
from lqexport.runtime.placement import Keep, in_place
from lqexport.runtime.products import times_transposed

PANEL = 512
"""Columns in a panel. The last bits of U depend on it, so it must not depend on how much memory there is."""

SOLVED_COLUMNS = 256
"""Rows of U that `CholeskyFactor.solved` multiplies by at once; the zeros before them are left out."""

SHARE_OF_MEDIAN = 0.5
"""The default dampening, over the median of the diagonal (see `usual_dampening`)."""

OVERFLOW = (
    "the inputs of this linear are not finite, or too large for a Hessian in float32, so a tensor before it has far "
    "too large weights. Get the checkpoint again, or take --method rtn, which needs no inputs."
)
"""The message where a Hessian overflows, or cannot be factorized even with dampening 10."""


@dataclass(frozen=True)
class CholeskyFactor:
    """The upper triangular U with H^-1 = U^T U, for a damped Hessian H whose columns are in solve order.

    panels      columns of U, float64 [stop, at most PANEL], without the rows below the panel, which are zero
    order       the solve order, int64 [C], on the device that computes: column i of U is column order[i] of H
    dampening   what was added to the diagonal of H, over the diagonal's mean
    """

    panels: list[Tensor]
    order: Tensor
    dampening: float

    def keeps_together(self, unit: int) -> bool:
        """Returns whether each `unit` columns of the matrix follow one another in the order."""
        if len(self.order) % unit:
            return False
        units = self.order.view(-1, unit)
        first = units[:, :1] // unit * unit
        return bool((units == first + torch.arange(unit, device=units.device)).all())

    def rows(self, run: slice) -> Tensor:
        """Returns U[run, run.start:], float32, on the device that computes."""
        parts = []
        for columns, panel in zip(runs(len(self.order)), self.panels, strict=True):
            if columns.stop > run.start:
                part = panel[run, max(0, run.start - columns.start) :].to(self.order.device).float()
                # A panel that ends within the run does not store the zero rows below its end.
                parts.append(torch.nn.functional.pad(part, (0, 0, 0, run.stop - run.start - len(part))))
        return torch.cat(parts, dim=1)

    def solved(self, right: Tensor) -> Tensor:
        """Returns right H^-1, float32 [R, C], for float32 `right` [R, C]; both have columns in the order of H."""
        remaining = right[:, self.order]
        ordered = torch.zeros_like(remaining)
        for start in range(0, len(self.order), SOLVED_COLUMNS):
            upper = self.rows(slice(start, min(start + SOLVED_COLUMNS, len(self.order))))
            ordered[:, start:] += times_transposed(times_transposed(remaining[:, start:], upper), upper.mT)
        result = torch.empty_like(ordered)
        result[:, self.order] = ordered
        return result

    def diagonal(self) -> Tensor:
        """Returns U_ii in solve order, float64 [C]."""
        parts = [panel[-panel.shape[1] :].diagonal().to(self.order.device) for panel in self.panels]
        return torch.cat(parts)

    def inverse_diagonal(self) -> Tensor:
        """Returns (H^-1)_ii in solve order, float64 [C]: the squared lengths of U's columns."""
        return torch.cat([panel.square().sum(0).to(self.order.device) for panel in self.panels])


def runs(columns: int) -> list[slice]:
    """Returns the slice of columns of each panel."""
    return [slice(start, min(start + PANEL, columns)) for start in range(0, columns, PANEL)]


def usual_dampening(diagonal: Tensor) -> float:
    """Returns the default dampening for a Hessian's diagonal [C], as a share of the diagonal's mean.

    It amounts to `SHARE_OF_MEDIAN` times the median of the columns that have any input. A share of the mean is too much
    where a few columns rule the mean, as before queries and keys. Where no column does, the usual share of 0.05 or less
    is too little: what the solver gains on its calibration tokens it loses on other tokens (docs/experiments.md).
    """
    used = diagonal[diagonal > 0]
    return SHARE_OF_MEDIAN * float(used.median() / diagonal.mean()) if len(used) else 0.0


def factorize(
    hessian: Tensor, dampening: float | None, act_order: bool, keep: Keep = in_place, unit: int = 1
) -> CholeskyFactor:
    """Returns the Cholesky factor of a damped Hessian.

    hessian     symmetric [C, C]
    dampening   what is added to the diagonal, over the diagonal's mean (None: `usual_dampening`)
    act_order   whether columns are solved by descending diagonal instead of from left to right
    keep        puts each finished panel where it stays
    unit        columns that stay together in act-order, beginning at each multiple

    If the factorization fails, the dampening rises tenfold, again and again, up to 10; the result records it. Raises
    UserError if it fails at 10, too.
    """
    diagonal = hessian.diagonal()
    order = torch.arange(len(diagonal), device=hessian.device)
    if act_order:
        importance = diagonal if unit == 1 else diagonal.unflatten(0, (-1, unit)).sum(1)
        order = order.view(-1, unit)[importance.argsort(descending=True, stable=True)].flatten()
    level = max(usual_dampening(diagonal) if dampening is None else dampening, 1e-6)
    while level <= 10:
        try:
            root = _root(hessian, order, level, keep)
        except torch.linalg.LinAlgError:
            level *= 10
            continue
        return CholeskyFactor(_inverted(root, hessian.device, keep), order, level)
    raise UserError(OVERFLOW)


def _root(hessian: Tensor, order: Tensor, dampening: float, keep: Keep) -> list[Tensor]:
    """Returns the panels of R, upper triangular with damped H = R R^T and H in `order`. Then U = R^-1.

    The last panel is computed first.
    """
    mean = hessian.diagonal().double().mean()
    extra = torch.where(mean > 0, dampening * mean, 1.0)  # as `feedback.damped` does
    panels: dict[int, Tensor] = {}
    for run in reversed(runs(len(order))):
        panel = hessian[:, order[run]][order[: run.stop]].double()
        corner = panel[run]
        corner.diagonal().add_(extra)
        for kept in panels.values():
            later = kept[: run.stop].to(hessian.device)
            panel -= later @ later[run].mT
        # torch's factor is lower triangular: reversing the matrix before and the factor after makes it upper.
        corner.copy_(torch.linalg.cholesky(corner.flip(0, 1)).flip(0, 1))
        above = panel[: run.start]
        above.copy_(torch.linalg.solve_triangular(corner.mT, above, upper=False, left=False))
        panels[run.start] = keep(panel)
    return list(reversed(panels.values()))


def _inverted(panels: list[Tensor], device: torch.device, keep: Keep) -> list[Tensor]:
    """Replaces the panels of R by those of R^-1, the last panel first.

    A panel of R^-1 needs its own panel of R and those to the left of it, so it may overwrite its own.
    """
    columns = runs(panels[-1].shape[0])
    for index in reversed(range(len(panels))):
        run = columns[index]
        inverse = torch.zeros(panels[index].shape, dtype=torch.float64, device=device)
        inverse[run].fill_diagonal_(1)
        for rows, kept in zip(reversed(columns[: index + 1]), reversed(panels[: index + 1]), strict=True):
            panel = kept.to(device)
            inverse[rows] = torch.linalg.solve_triangular(panel[rows], inverse[rows], upper=True)
            inverse[: rows.start] -= panel[: rows.start] @ inverse[rows]
        panels[index] = keep(inverse)
    return panels
