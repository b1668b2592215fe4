"""Second moments of a linear's inputs (the Hessian of its squared output error), and importances made from them."""

from __future__ import annotations

import torch
from torch import Tensor

from lqexport.recipe import ImportanceBase, Moments
from lqexport.solve import Factor

PANELS = 8
"""Of a symmetric matrix only what is below the diagonal is added up, in so many panels: 0.56 of the products."""


class SecondMoments:
    """H = sum over tokens of s_t x_t x_t^T, divided by the number of tokens. The weight s_t of a token is

    plain        1
    normalized   1 / |x_t|^2. A few tokens with massive activations (the first of a sequence, separators) otherwise rule
                 H, and the solver spends its freedom on outputs that the end loss does not depend on
    guided       the mean over the outputs j of (d loss / d z_tj)^2, z = W x, loss the summed cross-entropy: Kim et al.
                 2025 (GuidedQuant, eq. 7), one H for each of `output_groups` equal runs of outputs. Half of d H d^T,
                 summed over rows, then estimates in nats per token what the error d of the weights costs the model
    """

    def __init__(self, columns: int, kind: Moments, device: torch.device, output_groups: int = 1) -> None:
        self.kind = kind
        self._lower = torch.zeros(output_groups, columns, columns, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor, gradient: Tensor | None = None) -> None:
        """Add inputs [..., C] of any float dtype; products and sums are float32, on a GPU cuBLAS's (see
        `environment.full_float32`). Guided: and the loss's gradient [..., R] by the outputs, R a multiple of the output
        groups."""
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        columns = x.shape[1]
        for lower, weight in zip(self._lower, self._weights(x, gradient), strict=True):
            weighted = x if weight is None else x * weight.sqrt()[:, None]
            for start in range(0, columns, width := -(-columns // PANELS)):
                panel = slice(start, start + width)
                lower[start:, panel].addmm_(weighted[:, start:].T, weighted[:, panel])
        self.tokens += len(x)

    def _weights(self, x: Tensor, gradient: Tensor | None) -> list[Tensor | None]:
        """Each token's weight [tokens], for each output group."""
        if self.kind == "plain":
            return [None]
        if self.kind == "normalized":
            return [x.square().sum(1).clamp_min(1e-30).reciprocal()]
        assert gradient is not None
        return list(gradient.reshape(len(x), len(self._lower), -1).float().square().mean(2).T)

    def hessian(self) -> Tensor:
        """float32 [C, C], or [output groups, C, C] where there are several."""
        total = self._lower.tril() + self._lower.tril(-1).mT
        return (total[0] if len(total) == 1 else total) / max(self.tokens, 1)


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
