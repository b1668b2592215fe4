"""Second moments of a linear's inputs (the Hessian of its squared output error), and importances made from them."""

from __future__ import annotations

import torch
from torch import Tensor

from lqexport.recipe import ImportanceBase, Moments
from lqexport.solve import Factor


class SecondMoments:
    """H = sum over tokens of x x^T, divided by the number of tokens; with `normalized`, every x divided by its norm.

    A few tokens with massive activations (the first of a sequence, separators) otherwise rule H, and the solver spends
    its freedom on outputs that the end loss does not depend on.
    """

    def __init__(self, columns: int, kind: Moments, device: torch.device) -> None:
        self.kind = kind
        self.total = torch.zeros(columns, columns, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add inputs [..., C] of any float dtype; sums are float32."""
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        if self.kind == "normalized":
            x = x / x.norm(dim=1, keepdim=True).clamp_min(1e-20)
        self.total.addmm_(x.T, x)
        self.tokens += len(x)

    def hessian(self) -> Tensor:
        """float32 [C, C]."""
        return self.total / max(self.tokens, 1)


def importance(hessian: Tensor, factor: Factor, base: ImportanceBase, exponent: float) -> Tensor:
    """What an error of each input column weighs when a grid is fitted: float32 [C].

    diagonal   H_ii^p, the energy of the input (AWQ's and llama.cpp's importance at p = 1)
    cholesky   U_ii^-p with H^-1 = U^T U: LeanQuant's released code (its default exponent is 4)
    inverse    (H^-1_ii)^-p: LeanQuant's paper (eq. 4). U_ii^2 <= H^-1_ii, so cholesky at 2p is close to inverse at p
    """
    if base == "diagonal":
        return hessian.diagonal().double().clamp_min(0).pow(exponent).float()
    upper = factor.upper.double()
    spread = upper.diagonal() if base == "cholesky" else upper.square().sum(0)
    natural = torch.empty_like(spread)
    natural[factor.order] = spread.pow(-exponent)
    # Only ratios matter, and float32 must hold them: see weakness 16 of the original, where U^-p overflows.
    return (natural / natural.max()).float()
