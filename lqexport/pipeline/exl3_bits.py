"""Bits per weight of each linear for EXL3, from what each number of bits costs.

The cost follows from two things. One is measured once for the format: the squared error that a search of the trellis
leaves in Gaussian weights of unit variance, and rotated weights are nearly Gaussian (`DISTORTION`). The other is the
linear's own: what such an error costs under its second moments, in the rotated basis, after error feedback.

The experts of a block count as one tensor for each of their projections, since they must have one K.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lqexport.converters.exl3.plan import WIDTHS, padded_weights
from lqexport.converters.models.tensor_names import of_each_expert
from lqexport.formats.trellis import DISTORTION, SIDE, padded, rotated
from lqexport.pipeline.allocate import Allocation, Option, allocate
from lqexport.pipeline.measured_losses import Losses
from lqexport.recipe import SolverSettings
from lqexport.solver.cholesky import CholeskyFactor, factorize
from lqexport.solver.feedback import layer_loss

Floats = NDArray[np.float64]


def width_losses(weight: Tensor, hessian: Tensor, settings: SolverSettings, *, guided: bool) -> dict[str, float]:
    """Returns the predicted loss of a linear at every K, by the name of the codec.

    weight    float32 [R, C]
    hessian   second moments [C, C]
    guided    whether these are guided, so that losses are in nats per token
    """
    unit = 0.5 if guided else 1 / max(layer_loss(weight, hessian), 1e-30)
    cost, spread = unit_costs(weight, hessian, settings)
    return {WIDTHS[width]: unit * cost * error / (1 - min(0.5, error * spread)) for width, error in DISTORTION.items()}


def unit_costs(weight: Tensor, hessian: Tensor, settings: SolverSettings) -> tuple[float, float]:
    """Returns what the error of a search costs, over its mean square in weights of unit variance, and its spread.

    Blocks of 16 inputs are solved one after the other. The error E of a block, before the later ones make up for it,
    costs tr(E D E^T) with D the block of the factorization L D L^T of the damped second moments. The spread is the mean
    square, over that of E, of what error feedback adds to the targets of later blocks.
    """
    inputs, outputs = _scales(weight)
    basis = _rotated_basis(hessian, inputs)
    cholesky = factorize(basis, settings.dampening, act_order=False)
    extra = cholesky.dampening * float(basis.diagonal().double().mean())
    damped_cost = own_error = added = 0.0
    for block, root in _blocks(cholesky):
        upper = cholesky.rows(block).double()
        later = root @ upper[:, SIDE:]  # what an error of the block moves in later inputs
        damped_cost += float(root.square().sum())
        own_error += len(root) + float(later.square().sum())
        added += float(later.square().sum())
    cost = max(damped_cost - extra * own_error, 0.05 * damped_cost)
    return cost * float(outputs.square().sum()), added / len(basis)


def _blocks(cholesky: CholeskyFactor) -> list[tuple[slice, Tensor]]:
    """Returns each block of 16 inputs with the root R of D = R R^T, float64 [16, 16]."""
    blocks = []
    for start in range(0, len(cholesky.order), SIDE):
        block = slice(start, start + SIDE)
        corner = cholesky.rows(block)[:, :SIDE].double()
        eye = torch.eye(len(corner), dtype=torch.float64, device=corner.device)
        blocks.append((block, torch.linalg.solve_triangular(corner, eye, upper=True)))
    return blocks


def _scales(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the scales of inputs and outputs by which weights of unit variance become those of a linear."""
    outputs = weight.square().mean(1).sqrt().clamp_min(1e-30)
    outputs = outputs / outputs.square().mean().sqrt()
    inputs = (weight / outputs[:, None]).square().mean(0).sqrt()
    return inputs, outputs


def _rotated_basis(hessian: Tensor, inputs: Tensor) -> Tensor:
    """Returns the second moments of scaled and rotated inputs, padded to multiples of 128."""
    scaled = (hessian * inputs[:, None] * inputs).cpu().numpy()
    wide = np.pad(scaled, [(0, padded(len(scaled)) - len(scaled))] * 2)
    half = rotated(np.ascontiguousarray(rotated(wide).T))
    return torch.from_numpy(half).to(hessian.device)


def chosen_widths(losses: Losses, shapes: Mapping[str, tuple[int, int]], bits: float) -> Allocation:
    """Returns the K of every linear, all together at most `bits` per weight, as `plan_exl3` counts them.

    Raises UserError if no choice is so small.
    """
    together: dict[str, list[str]] = {}
    for name in shapes:
        together.setdefault(of_each_expert(name), []).append(name)
    tensors = {group: _options(names, losses, shapes) for group, names in together.items()}
    limit = int(bits * sum(padded_weights(shape) for shape in shapes.values()) / 8)
    allocation = allocate(tensors, limit)
    chosen = {
        name: Option(option.name, _nbytes(option.name, shapes[name]), losses[name][option.name])
        for group, option in allocation.chosen.items()
        for name in together[group]
    }
    return Allocation({name: chosen[name] for name in shapes}, allocation.nbytes, allocation.loss, allocation.gap)


def _options(names: list[str], losses: Losses, shapes: Mapping[str, tuple[int, int]]) -> list[Option]:
    return [
        Option(codec, sum(_nbytes(codec, shapes[name]) for name in names), sum(losses[name][codec] for name in names))
        for codec in WIDTHS.values()
    ]


def _nbytes(codec_name: str, shape: tuple[int, int]) -> int:
    """Returns the bytes of a trellis. Weights are multiples of 128 x 128, so half bits are whole bytes, too."""
    width = next(width for width, name in WIDTHS.items() if name == codec_name)
    return int(width * padded_weights(shape)) // 8
