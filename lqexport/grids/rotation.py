"""The basis in which EXL3 stores a linear: scales of inputs and outputs, and rotations of runs of 128.

With W^T [C, R] the weights as the file has them, S and V the diagonal matrices of the stored scales, and B the Hadamard
matrix of 128 on each run of 128, the file's weights are S B Q B V, for values Q of walks through a trellis
(`formats.trellis`). What Q should come near to is X = B S^-1 W^T V^-1 B.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lqexport.formats import trellis
from lqexport.formats.trellis import BLOCK, Walks, padded
from lqexport.grids.signs import even_signs

SPREAD = 0.12
"""How much noise moves from inputs that count to those that do not (`fit_basis`).

At 0.25 the noise would be the least if rows were solved apart. Error feedback moves noise by itself, and leaves less to
gain."""
FLOOR = 1e-3
"""The least scale of an input or of a run of outputs, over the root mean square of all."""


@dataclass(frozen=True)
class Basis:
    """The scales of a linear, float32 of either sign, none of them 0.

    inputs    [C]
    outputs   [R], alike in each run of 128 but for the sign
    """

    inputs: Tensor
    outputs: Tensor

    def into(self, weight: Tensor) -> Tensor:
        """Returns X [padded C, padded R] for weights [R, C]."""
        scaled = (weight / self.outputs[:, None] / self.inputs).T
        return rotated(rotated(_padded(scaled)).T).T.contiguous()

    def moments(self, hessian: Tensor, beyond: float) -> Tensor:
        """Returns M = B S H S B, float64 [padded C, padded C], for second moments H [C, C].

        The loss of an error X - Q, E, is tr(E^T M E) if all scales of outputs are alike. `beyond` is the second moment
        of the inputs of the padding.
        """
        matrix = _padded(hessian.double() * self.inputs.double() * self.inputs.double()[:, None])
        scale = self.inputs.double().square().mean()
        matrix.diagonal()[len(self.inputs) :] = beyond * scale
        return rotated(rotated(matrix).T).contiguous()

    def out_of(self, values: Tensor) -> Tensor:
        """Returns B Q B without the padding, transposed [R, C], for values Q [padded C, padded R]."""
        return rotated(rotated(values)[: len(self.inputs)].T)[: len(self.outputs)].contiguous()


@dataclass(frozen=True)
class TensorWalks:
    """The stored scales of a linear whose walks stay, for tuning. The counterpart of `formats.trellis.Walks`.

    inputs    float32 [C], each exactly a float16
    outputs   float32 [R], the same
    """

    inputs: Tensor
    outputs: Tensor

    @staticmethod
    def of(walks: Walks, device: torch.device) -> TensorWalks:
        """Returns the scales of walks, on a device."""
        inputs, outputs = (torch.from_numpy(each.astype(np.float32)) for each in (walks.inputs, walks.outputs))
        return TensorWalks(inputs.to(device), outputs.to(device))

    def values(self, codes: Tensor) -> Tensor:
        """Returns the weights, float32 [R, C], of codes that `unscaled` returns.

        They have gradients with respect to the scales. The roundings to float16 on the way, which move a weight by a
        few units of its last place, are left out.
        """
        return codes.float() * self.inputs * self.outputs[:, None]


def unscaled(walks: Walks) -> NDArray[np.float16]:
    """Returns the weights of walks without their scales, float16 [R, C]: the codes that tuning keeps."""
    inputs, outputs = (np.ones_like(each) for each in (walks.inputs, walks.outputs))
    return replace(walks, inputs=inputs, outputs=outputs).values().astype(np.float16)


def rotated(matrix: Tensor) -> Tensor:
    """Returns B times a float matrix [128 n, columns]."""
    return (_hadamard(matrix.dtype, matrix.device) @ matrix.unflatten(0, (-1, BLOCK))).flatten(0, 1)


def fit_basis(weight: Tensor, importance: Tensor, deviation: float) -> Basis:
    """Returns the scales for which each run of X has a given standard deviation.

    weight      float32 [R, C]
    importance  float32 [C], above 0: what an error of each input counts
    deviation   the standard deviation of X

    All runs of a rotated matrix get the same relative noise, so the scales of a run's inputs share it out. Input i gets
    the scale r_i (1 / (importance_i r_i^2))^SPREAD, for r_i the root mean square of its weights. Each run of 128
    outputs has the scale of its root mean square. Signs are drawn at random, always the same for a number of inputs or
    outputs, and then some are flipped (`even_signs`).
    """
    outputs = _of_runs(weight.square().mean(1))
    outputs = outputs / outputs.mean().clamp_min(1e-30)
    energy = (weight / outputs.clamp_min(FLOOR)[:, None]).square().sum(0) / padded(len(weight))
    energy = energy.clamp_min(float(FLOOR**2 * energy.mean()) + 1e-12)
    inputs = energy.sqrt() * (importance * energy).pow(-SPREAD)
    inputs = inputs * _of_runs(energy / inputs.square()) / deviation
    basis = Basis(inputs * random_signs(inputs, 1), outputs.clamp_min(FLOOR) * random_signs(outputs, 2))
    rows = _padded((weight / basis.outputs[:, None] / basis.inputs).T)
    return Basis(basis.inputs * _even(rows)[: len(inputs)], basis.outputs * _even(rows.T)[: len(outputs)])


def _even(rows: Tensor) -> Tensor:
    """Returns the signs [128 n] of rows [128 n, columns] that spread their rotated weights evenly."""
    runs = rows.unflatten(0, (-1, BLOCK)).contiguous()
    return even_signs(runs, _hadamard(rows.dtype, rows.device)).flatten()


def _of_runs(squares: Tensor) -> Tensor:
    """Returns the root of the mean of each run of 128 squares [n], for each of them [n]. The padding is zeros."""
    runs = torch.nn.functional.pad(squares, (0, padded(len(squares)) - len(squares))).unflatten(0, (-1, BLOCK))
    return runs.mean(1).sqrt().repeat_interleave(BLOCK)[: len(squares)]


def random_signs(like: Tensor, seed: int) -> Tensor:
    """Returns random signs [n], drawn on the host."""
    draw = np.random.default_rng(seed).integers(0, 2, len(like), dtype=np.int8)
    return torch.from_numpy(1 - 2 * draw).to(like)


def _padded(matrix: Tensor) -> Tensor:
    """Returns a matrix with zeros up to multiples of 128."""
    down, across = (padded(size) - size for size in matrix.shape)
    return torch.nn.functional.pad(matrix, (0, across, 0, down))


def _hadamard(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns the Hadamard matrix of 128, over the root of 128."""
    signs = trellis.rotated(np.eye(BLOCK, dtype=np.float32)) > 0
    return torch.from_numpy(2 * signs - 1).to(device, dtype) / BLOCK**0.5
