"""Low-rank correction of what quantization left: W ~ Q + B A, with B [R, k] and A [k, C] (LQER, Zhang et al. 2024).

For the error E = W - Q [R, C] and a weighting M [C, C] of its columns, the rank-k product that minimises
tr((E - B A) M (E - B A)^T) is the projection of E onto the first k eigenvectors U of E M E^T: B A = U U^T E. (With
M = S S^T and the SVD E S = U D V^T, LQER's own form is B A = U_k D_k V_k^T S^-1; V^T S^-1 = D^-1 U^T E, so nothing
needs to be inverted, and no root of M to be taken.) The scalings differ in M alone:

    lqer        the identity: plain SVD of the error
    l2qer       s_i^2 on the diagonal, s_i the largest mean |x_i| of any calibration sequence (L2QER as its authors
                compute it, a sequence for a batch)
    qera-diag   the diagonal of the second moments (QERA-approx, Zhang et al. 2024)
    qera        the second moments themselves (QERA-exact): the least output error that any rank-k correction leaves
"""

from __future__ import annotations

import torch
from torch import Tensor

from lqexport.recipe import Scaling

OVERSAMPLE = 32
ITERATIONS = 12
"""Of the subspace iteration. What it leaves of the loss is at most 0.1 % above what the full SVD leaves
(tests/test_lowrank.py)."""


def column_weighting(scaling: Scaling, hessian: Tensor, magnitudes: Tensor | None) -> Tensor:
    """M for `scaling`: float64 [C] where it is diagonal, else [C, C].

    hessian      second moments of the inputs [C, C]
    magnitudes   largest mean |x_i| of any calibration sequence [C], which l2qer alone needs
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
    """B [R, k] and A [k, C], float32, of the best correction of rank `rank` to float32 `error` [R, C].

    Columns of B by falling share of the error that they take away, so that the first j columns of B and rows of A are
    the best correction of rank j. Equal norms of B and A, so that both fit float16.
    """
    error = error.double()
    basis, energies = leading_eigenvectors(error, weighting, rank)
    sizes = energies.clamp_min(1e-300).sqrt()
    up, down = basis * sizes, (basis / sizes).T @ error
    balance = (down.norm() / up.norm().clamp_min(1e-300)).sqrt()
    return (up * balance).float(), (down / balance.clamp_min(1e-300)).float()


def leading_eigenvectors(error: Tensor, weighting: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first `rank` eigenvectors [R, k] and eigenvalues [k], falling, of E M E^T for float64 `error` [R, C].

    By subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4), which needs only thin products.
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
    """E M E^T times vectors [R, n]."""
    inner = error.T @ vectors
    return error @ (weighting @ inner if weighting.ndim == 2 else weighting[:, None] * inner)


def loss_by_rank(error: Tensor, hessian: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """tr(D H D^T) for D = E - B_j A_j, float64 [k + 1]: the loss with the first j = 0..k columns of B and rows of A.

    Exact for any B [R, k] and A [k, C], so also for factors as a file rounds them.
    """
    error, hessian, up, down = (matrix.double() for matrix in (error, hessian, up, down))
    through = error @ hessian
    gain = (up * (through @ down.T)).sum(0)
    cross = (up.T @ up) * (down @ hessian @ down.T)
    added = 2 * cross.tril(-1).sum(1) + cross.diagonal() - 2 * gain
    return torch.cat(((through * error).sum()[None], added)).cumsum(0)
