"""The factor of a damped Hessian that error feedback goes by: U with H^-1 = U^T U, in panels of columns.

H and U are of 28672 columns in a model of 70 billion weights, and a float64 matrix of those is 6.6 GB. So neither H in
float64 nor an inverse is ever whole: only panels of the triangle are, computed one by one (left-looking Cholesky, then
the inverse in its place), and each goes to where panels are kept, on the device or elsewhere, while others are made.
The arithmetic is the same wherever that is, on contiguous copies on the device, and so are the bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lqexport.errors import UserError
from lqexport.runtime.placement import Keep, in_place

PANEL = 2048
"""Columns in a panel. The last bits of a factor depend on it, so it never depends on how much memory there is."""

SHARE_OF_MEDIAN = 0.5
"""What is added to the diagonal, where nothing is asked for, over its median."""


@dataclass(frozen=True)
class CholeskyFactor:
    """U of a damped Hessian in solve order.

    panels      float64 [stop, at most PANEL]: columns of U, without the zeros below the triangle
    order       int64 [C], on the device that computes
    dampening   what it took
    """

    panels: list[Tensor]
    order: Tensor
    dampening: float

    def rows(self, run: slice) -> Tensor:
        """float32 U[run, run.start:] on the device that computes."""
        parts = []
        for columns, panel in zip(runs(len(self.order)), self.panels, strict=True):
            if columns.stop > run.start:
                part = panel[run, max(0, run.start - columns.start) :].to(self.order.device).float()
                # A panel that ends within the run has no rows below its end: those are zeros.
                parts.append(torch.nn.functional.pad(part, (0, 0, 0, run.stop - run.start - len(part))))
        return torch.cat(parts, dim=1)

    def diagonal(self) -> Tensor:
        """float64 U_ii [C]."""
        parts = [panel[-panel.shape[1] :].diagonal().to(self.order.device) for panel in self.panels]
        return torch.cat(parts)

    def inverse_diagonal(self) -> Tensor:
        """float64 (H^-1)_ii [C], in solve order: the squared lengths of U's columns."""
        return torch.cat([panel.square().sum(0).to(self.order.device) for panel in self.panels])


def runs(columns: int) -> list[slice]:
    """The columns of each panel."""
    return [slice(start, min(start + PANEL, columns)) for start in range(0, columns, PANEL)]


def usual_dampening(diagonal: Tensor) -> float:
    """What is added to a diagonal over its mean, so that it is a share of the median of the columns with any input.
    Where a few columns rule the mean, as before queries and keys, a share of that is too much for the others; where
    none does, the usual 0.05 or less is too little: what the solver gains on its own tokens it loses on others
    (docs/experiments.md)."""
    used = diagonal[diagonal > 0]
    return SHARE_OF_MEDIAN * float(used.median() / diagonal.mean()) if len(used) else 0.0


def factorize(hessian: Tensor, dampening: float | None, act_order: bool, keep: Keep = in_place) -> CholeskyFactor:
    """U with (damped H)^-1 = U^T U for a symmetric `hessian` [C, C], columns in act-order (descending diagonal) where
    asked; `keep` puts each panel where it stays. `dampening` is over the diagonal's mean (None: `usual_dampening`).

    Where the factorization fails, the dampening rises tenfold and again, up to 10; the result says what it took. Raises
    UserError beyond that.
    """
    diagonal = hessian.diagonal()
    natural = torch.arange(len(diagonal), device=hessian.device)
    order = diagonal.argsort(descending=True, stable=True) if act_order else natural
    level = max(usual_dampening(diagonal) if dampening is None else dampening, 1e-6)
    while level <= 10:
        try:
            root = _root(hessian, order, level, keep)
        except torch.linalg.LinAlgError:
            level *= 10
            continue
        return CholeskyFactor(_inverted(root, hessian.device, keep), order, level)
    raise UserError("The Hessian cannot be factorized even with dampening 10: are the activations finite?")


def _root(hessian: Tensor, order: Tensor, dampening: float, keep: Keep) -> list[Tensor]:
    """R upper triangular with damped H = R R^T, H in `order`, so that U = R^-1. The last panel comes first."""
    mean = hessian.diagonal().double().mean()
    extra = torch.where(mean > 0, dampening * mean, 1.0)  # as `solve.damped`
    panels: dict[int, Tensor] = {}
    for run in reversed(runs(len(order))):
        panel = hessian[:, order[run]][order[: run.stop]].double()
        corner = panel[run]
        corner.diagonal().add_(extra)
        for kept in panels.values():
            later = kept.to(hessian.device)
            panel -= later[: run.stop] @ later[run].mT
        # Cholesky of the reversed matrix, reversed
        corner.copy_(torch.linalg.cholesky(corner.flip(0, 1)).flip(0, 1))
        above = panel[: run.start]
        above.copy_(torch.linalg.solve_triangular(corner.mT, above, upper=False, left=False))
        panels[run.start] = keep(panel)
    return list(reversed(panels.values()))


def _inverted(panels: list[Tensor], device: torch.device, keep: Keep) -> list[Tensor]:
    """The panels of R^-1 in the place of those of R. The last needs all of R, the one before it all but the last."""
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
