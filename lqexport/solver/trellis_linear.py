"""Solves one linear for EXL3: scales, walks, and scales once more."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lqexport.formats.codec import FLOAT16
from lqexport.formats.trellis import Trellis, Walks
from lqexport.grids.rotation import Basis, fit_basis
from lqexport.recipe import SolverSettings
from lqexport.runtime.products import times_transposed
from lqexport.solver.cholesky import CholeskyFactor
from lqexport.solver.feedback import damped
from lqexport.solver.solve_trellis import SEAMS, Encoder, feedback, sweep

REFITS = 2
"""How often the scales of outputs and of inputs are refitted in turn."""
DEVIATIONS = (1.02, 1.01, 0.98, 0.96, 0.95, 0.95, 0.95)
"""The standard deviation of a run's weights that leaves the least error, for K of 1, 1.5, ... 4 bits per weight.

Rotated weights are nearly Gaussian, so it is the same for all linears. Without feedback, which spreads what it aims at,
it would be 1.1 at 1 bit and 1 at 2 bits. The refit makes up for the rest."""
DEVIATIONS_OF_MORE = {10: 0.9, 12: 0.85, 14: 0.8, 16: 0.75}
"""The same for more bits, by twice K (bench/exl3_distortion.py). What lies beyond the codebook costs more there."""

BEYOND = 0.1
"""The second moment of inputs that only pad a linear, over the least damped one. Errors there cost nothing, but with
zeros the moments would have no factor."""


def solve_walks(
    trellis: Trellis, weight: Tensor, hessian: Tensor | None, cholesky: CholeskyFactor | None, settings: SolverSettings
) -> Walks:
    """Returns a linear as EXL3 stores it.

    weight     float32 [R, C]
    hessian    second moments [C, C] of its inputs; None if all inputs count alike
    cholesky   their factor, which gives the dampening and the importance of inputs; None without second moments
    settings   `descent` sweeps refine the walks if the method is `lean`
    """
    identity = torch.eye(weight.shape[1], device=weight.device)
    matrix, importance = identity, identity[0].new_ones(len(identity))
    if hessian is not None and cholesky is not None:
        matrix = damped(hessian, cholesky.dampening)
        importance[cholesky.order] = cholesky.inverse_diagonal().reciprocal().float()
    basis = fit_basis(weight, importance, _deviation(trellis))
    aim, moments = basis.into(weight), basis.moments(matrix, BEYOND * float(matrix.diagonal().min()))
    encoder = Encoder(trellis)
    values, states = feedback(aim, moments, encoder)
    moments = moments.float()
    for turn in range(settings.descent if settings.method == "lean" else 0):
        sweep(aim, moments, values, states, encoder, SEAMS[turn % 2])
    basis = refitted(basis, basis.out_of(values), weight, matrix)
    return Walks(trellis, states, _half(basis.inputs), _half(basis.outputs))


def refitted(basis: Basis, values: Tensor, weight: Tensor, hessian: Tensor) -> Basis:
    """Returns the scales of least loss for fixed walks, in closed form, first of the outputs and then of the inputs.

    values    B Q B of the walks, transposed [R, C]
    weight    [R, C]
    hessian   [C, C], damped
    """
    pull = times_transposed(weight, hessian)
    inputs, outputs = basis.inputs, basis.outputs
    for _ in range(REFITS):
        scaled = values * inputs
        squares = (times_transposed(scaled, hessian) * scaled).sum(1)
        outputs = torch.where(squares > 0, (pull * scaled).sum(1) / squares.clamp_min(1e-30), outputs)
        scaled = (values * outputs[:, None]).T.contiguous()
        matrix = (hessian * times_transposed(scaled, scaled)).double()
        ridge = 1e-9 * matrix.diagonal().mean() + 1e-30
        matrix.diagonal().add_(ridge)
        right = (pull.T * scaled).sum(1).double() + ridge * inputs
        inputs = torch.linalg.solve(matrix, right).float()
    return Basis(inputs, outputs)


def _deviation(trellis: Trellis) -> float:
    index = trellis.halves - 2
    known = DEVIATIONS[index] if index < len(DEVIATIONS) else DEVIATIONS_OF_MORE[trellis.halves]
    return known * float(trellis.table.std())


def _half(scales: Tensor) -> np.ndarray:
    return scales.clamp(FLOAT16.least, FLOAT16.most).cpu().numpy().astype(np.float16)
