"""Asymmetric calibration: weights that, on the inputs of the quantized model, aim at the full-precision outputs.

With X the full-precision inputs of a linear and Y those of the quantized prefix, |W X - Q Y|^2 is, up to a constant,
(Q - V) (Y Y^T) (Q - V)^T for V = W (X Y^T) (Y Y^T)^-1: the solver's own loss around another target. Taken whole, the
correction fits the calibration text (CoreQ); so it is computed from half of the batches, and its strength is the one
that leaves the least error on the other half.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lqexport.recipe import Moments
from lqexport.solve import damped


class CrossMoments:
    """Y Y^T and (X - Y) Y^T of a linear's inputs, float32 [2, C, C]: one sum of even batches and one of odd."""

    def __init__(self, columns: int, kind: Moments, device: torch.device) -> None:
        self.kind = kind
        self.own, self.drift = torch.zeros(2, 2, columns, columns, device=device)
        self.tokens = 0

    def add(self, half: int, full: Tensor, quantized: Tensor, weights: Tensor | None = None) -> None:
        """Add inputs [..., C] of both models for the same tokens; `half` is 0 or 1. Guided: and weights [tokens]."""
        x, y = (inputs.reshape(-1, inputs.shape[-1]).float() for inputs in (full, quantized))
        if self.kind == "normalized":  # as in `moments.SecondMoments`, by the inputs that the solver sees
            norm = y.norm(dim=1, keepdim=True).clamp_min(1e-15)
            x, y = x / norm, y / norm
        if weights is not None:
            root = weights.to(y.device).sqrt()[:, None]
            x, y = x * root, y * root
        self.own[half].addmm_(y.T, y)
        self.drift[half].addmm_((x - y).T, y)
        self.tokens += len(x)

    def hessian(self) -> Tensor:
        """float32 [C, C], as `moments.SecondMoments.hessian` of the quantized inputs."""
        return self.own.sum(0) / max(self.tokens, 1)

    def target(self, weight: Tensor, dampening: float) -> tuple[Tensor, float]:
        """The weights [R, C] to quantize in the place of `weight`, and the strength of the correction, 0 to 1."""
        correction = _correction(weight, self.own[0], self.drift[0], dampening)
        wanted = float(((weight @ self.drift[1]) * correction).sum())
        energy = float(((correction @ self.own[1]) * correction).sum())
        strength = min(max(wanted / energy, 0.0), 1.0) if energy > 0 else 0.0
        if strength:
            correction = _correction(weight, self.own.sum(0), self.drift.sum(0), dampening)
        return weight + strength * correction, strength


def _correction(weight: Tensor, own: Tensor, drift: Tensor, dampening: float) -> Tensor:
    """W (X - Y) Y^T (Y Y^T)^-1, dampened."""
    matrix = damped(own, max(dampening, 1e-6)).double()
    return torch.linalg.solve(matrix, (weight @ drift).double(), left=False).float()
