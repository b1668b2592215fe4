"""The importance of input columns: how much an error in each column counts when a grid is fitted."""

from __future__ import annotations

import torch
from torch import Tensor

from lqexport.recipe import ImportanceBase
from lqexport.solver.cholesky import CholeskyFactor


def importance(hessian: Tensor, cholesky: CholeskyFactor, base: ImportanceBase, exponent: float) -> Tensor:
    """Returns the importance of each input column, float32 [C], from its Hessian [C, C] and the exponent p.

    `base` is one of

    diagonal   H_ii^p, the energy of the input (AWQ's and llama.cpp's importance at p = 1)
    cholesky   U_ii^-p with H^-1 = U^T U: LeanQuant's released code (its default exponent is 4)
    inverse    (H^-1_ii)^-p: LeanQuant's paper (eq. 4). U_ii^2 <= H^-1_ii, so cholesky at 2p is close to inverse at p
    """
    if base == "diagonal":
        return hessian.diagonal().double().clamp_min(0).pow(exponent).float()
    spread = cholesky.diagonal() if base == "cholesky" else cholesky.inverse_diagonal()
    natural = torch.empty_like(spread)
    natural[cholesky.order] = spread.pow(-exponent)
    # Only ratios matter, and float32 must hold them: U^-p alone overflows, as it does in LeanQuant's released code.
    return (natural / natural.max()).float()
