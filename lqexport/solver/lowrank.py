"""Computes the low-rank correction of quantization error: W ~ Q + B A, B [R, k], A [k, C] (LQER, Zhang et al. 2024).

The error is E = W - Q [R, C], and M [C, C] is a weighting of its columns. The rank-k product that minimises
tr((E - B A) M (E - B A)^T) is the projection of E onto the first k eigenvectors U of E M E^T: B A = U U^T E.

LQER writes this as B A = U_k D_k V_k^T S^-1, with M = S S^T and the SVD E S = U D V^T. Since V^T S^-1 = D^-1 U^T E,
both forms are equal, and the one used here needs neither an inverse nor a root of M.

The scalings differ in M alone:

    lqer        the identity: plain SVD of the error
    l2qer       s_i^2 on the diagonal, s_i the largest mean |x_i| of any calibration sequence (L2QER as its authors
                compute it, a sequence for a batch)
    qera-diag   the diagonal of the second moments (QERA-approx, Zhang et al. 2024)
    qera        the second moments themselves (QERA-exact): no rank-k correction leaves a smaller output error

In the code, `up` is B and `down` is A.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lqexport.recipe import Scaling

OVERSAMPLE = 32
"""Vectors that the subspace iteration carries beside the wanted ones, so that those converge faster."""
ITERATIONS = 12
"""Steps of the subspace iteration. With them the loss that remains is at most 0.1 % above that of the full SVD
(tests/test_lowrank.py)."""
LEAST_SHARE = 1e-12
"""Share of the largest eigenvalue below which an eigenvector is left out of a correction."""


def column_weighting(scaling: Scaling, hessian: Tensor, magnitudes: Tensor | None) -> Tensor:
    """Returns the weighting M of a scaling: float64 [C] if M is diagonal, else [C, C].

    hessian      second moments of the inputs [C, C]
    magnitudes   largest mean |x_i| of any calibration sequence [C]; needed for l2qer alone
    """
    if scaling == "qera":
        return hessian.double()
    if scaling == "qera-diag":
        return hessian.diagonal().double()
    if scaling == "lqer":
        return torch.ones_like(hessian[0], dtype=torch.float64)
    assert magnitudes is not None
    return magnitudes.double().clamp_min(1e-4).square()


def correction(error: Tensor, weighting: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns B [R, k] and A [k, C], float32: the best correction of rank k = `rank` of float32 `error` [R, C].

    The columns of B are sorted by the share of the error that they remove, the largest first. So the first j columns of
    B and rows of A are the best correction of rank j. B and A have equal norms, so that both fit float16.
    Eigenvectors that the weighting does not see are zero in both: their rows of A would be too large.
    """
    error = error.double()
    basis, energies = leading_eigenvectors(error, weighting, rank)
    seen = energies > LEAST_SHARE * energies[:1]
    sizes = energies.where(seen, 1).sqrt()
    up, down = basis * sizes * seen, (basis / sizes * seen).T @ error
    balance = (down.norm() / up.norm().clamp_min(1e-300)).sqrt()
    return (up * balance).float(), (down / balance.clamp_min(1e-300)).float()


def leading_eigenvectors(error: Tensor, weighting: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns the first k = `rank` eigenvectors [R, k] and eigenvalues [k] of E M E^T, the largest first.

    `error` is E, float64 [R, C]. The method is subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4),
    which needs only thin products.
    """
    width = min(rank + OVERSAMPLE, len(error))
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(error), width, generator=generator, dtype=torch.float64).to(error.device)
    block = _product(error, weighting, start)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(block).Q
        block = _product(error, weighting, basis)
    values, rotation = torch.linalg.eigh((basis.T @ block + block.T @ basis) / 2)
    return (basis @ rotation).flip(1)[:, :rank], values.flip(0)[:rank].clamp_min(0)


def _product(error: Tensor, weighting: Tensor, vectors: Tensor) -> Tensor:
    """Returns E M E^T times vectors [R, n]."""
    inner = error.T @ vectors
    return error @ (weighting @ inner if weighting.ndim == 2 else weighting[:, None] * inner)


def loss_by_rank(error: Tensor, hessian: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Returns the losses that remain with the first j = 0..k columns of B and rows of A, float64 [k + 1].

    The loss is tr(D H D^T) for D = E - B_j A_j. It is exact for any B [R, k] and A [k, C], so also for low-rank factors
    that a file has rounded.
    """
    error, hessian, up, down = (matrix.double() for matrix in (error, hessian, up, down))
    through = error @ hessian
    gain = (up * (through @ down.T)).sum(0)
    cross = (up.T @ up) * (down @ hessian @ down.T)
    added = 2 * cross.tril(-1).sum(1) + cross.diagonal() - 2 * gain
    return torch.cat(((through * error).sum()[None], added)).cumsum(0)
