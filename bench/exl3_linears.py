"""Compares what EXL3 loses on linears of a model: the recipe of ExLlamaV3's converter, and lqexport's solver.

    python bench/exl3_linears.py MODEL --calibration FILE --evaluation FILE [--block 12] [--samples 30] [--bits 2 3 4]

Prints the squared error of a linear's outputs on the evaluation tokens, over their energy: as the converter's recipe
(version 1.6.5, written anew in `converted`) leaves it, and over that error what lqexport leaves after feedback and
after two sweeps. All see plain second moments of the same calibration tokens. Prints Markdown.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import numpy as np
import torch
from common import comparison_parser
from torch import Tensor
from vectors import block_linears

from lqexport.calibration.sequences import load_calibration
from lqexport.formats.exl3 import EXL3
from lqexport.formats.trellis import BLOCK, ROW, SIDE, States, Trellis, Walks
from lqexport.grids.rotation import Basis, random_signs
from lqexport.models.source import open_source
from lqexport.recipe import Recipe
from lqexport.solver.feedback import damped, layer_loss
from lqexport.solver.linear import solve_linear
from lqexport.solver.solve_trellis import Encoder, feedback
from lqexport.solver.trellis_linear import refitted
from lqexport.storage.artifact import decoded

LINEARS = ("self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
SETTINGS = Recipe("model", "exl3:2").solver_settings
REGULARIZATION = 0.025
"""What the converter adds to the diagonal, over its mean."""
SCALES = (0.6, 0.68, 0.76, 0.84, 0.92)
"""Scales of the whole matrix that are tried, in units of 1.24371088 over the root mean square of its weights."""


class Unweighted(Encoder):
    """Searches walks by plain squared error, whatever the weights are."""

    def nearest(self, target: Tensor, weights: Tensor, states: States, seam: int | None = None) -> Tensor:
        return super().nearest(target, torch.ones_like(weights), states, seam)


def converted(trellis: Trellis, weight: Tensor, hessian: Tensor) -> Walks:
    """Returns a linear as the converter's recipe leaves it.

    Outputs are scaled by the root mean square of their weights, then inputs, then the whole matrix, for the least error
    of sample tiles. Feedback runs under the rotated second moments without these scales, and tiles count all errors
    alike. Then the scales of outputs and inputs are refitted twice.
    """
    matrix = damped(hessian, REGULARIZATION)
    outputs = weight.square().mean(1).sqrt()
    outputs = outputs / outputs.mean()
    inputs = (weight / outputs[:, None]).square().mean(0).sqrt() / 1.24371088
    basis = Basis(inputs * random_signs(inputs, 1), outputs * random_signs(outputs, 2))
    encoder = Unweighted(trellis)
    scale = _best_scale(basis.into(weight), encoder)
    basis = Basis(basis.inputs / scale, basis.outputs)
    rotated = Basis(basis.inputs.sign(), basis.outputs).moments(matrix, float(matrix.diagonal().min()))
    values, states = feedback(basis.into(weight), rotated, encoder)
    basis = refitted(basis, basis.out_of(values), weight, matrix)
    half = [scales.numpy().astype(np.float16) for scales in (basis.inputs, basis.outputs)]
    return Walks(trellis, states, *half)


def _best_scale(aim: Tensor, encoder: Encoder) -> float:
    """Returns the scale under which tiles on a wrapped diagonal have the least error."""
    tiles = aim.unflatten(0, (-1, SIDE)).unflatten(2, (-1, SIDE)).transpose(1, 2)
    down, across = tiles.shape[:2]
    sample = torch.cat([tiles[i, i % across] for i in range(0, down, 2)], dim=1)
    states = np.empty((sample.shape[1] // SIDE, len(ROW)), np.uint16)

    def error(scale: float) -> float:
        nearest = encoder.nearest(sample * scale, torch.ones(SIDE), states) / scale
        return float((nearest - sample).square().sum())

    errors = [error(scale) for scale in SCALES]
    middle = min(max(int(np.argmin(errors)), 1), len(SCALES) - 2)
    left, low, right = errors[middle - 1 : middle + 2]
    step = 0.5 * (left - right) / max(left - 2 * low + right, 1e-30)
    return SCALES[middle] + min(max(step, -1.0), 1.0) * (SCALES[1] - SCALES[0])


def row(name: str, bits: str, weight: Tensor, calibration: Tensor, evaluation: Tensor) -> str:
    """Returns the errors of the recipes on the evaluation tokens, and the solver's seconds, as table cells."""
    energy = layer_loss(weight, evaluation)

    def error(values: np.ndarray) -> float:
        return layer_loss(torch.from_numpy(values) - weight, evaluation) / energy

    theirs = error(converted(EXL3[f"exl3:{bits}"].trellis, weight, calibration).values())
    ours = []
    for descent in (0, 2):
        began, settings = time.process_time(), replace(SETTINGS, descent=descent)
        stored = solve_linear(name, weight, calibration, f"exl3:{bits}", settings)
        ours.append(error(decoded(stored)) / theirs)
    seconds = time.process_time() - began
    return f"{theirs:.5f} | {ours[0]:.3f} | {ours[1]:.3f} | {1e6 * seconds / weight.numel():.1f}"


def _moments(arguments: argparse.Namespace, text: str, samples: int) -> dict[str, tuple[Tensor, Tensor]]:
    source = open_source(arguments.model)
    tokens = load_calibration(text, source.tokenizer(), samples=samples, sequence_length=512, seed=0).tokens
    return block_linears(source, tokens, arguments.block, LINEARS, "plain")


def main() -> None:
    parser = comparison_parser(__doc__)
    parser.add_argument("--block", type=int, default=12)
    parser.add_argument("--rows", type=int, default=2 * BLOCK, help="outputs of each linear, the first ones")
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--bits", nargs="+", default=["2", "3", "4"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    calibration = _moments(arguments, arguments.calibration, arguments.samples)
    evaluation = _moments(arguments, arguments.evaluation, max(1, arguments.samples // 2))
    print("| bits | linear | converter | feedback | sweeps | s per million weights |\n|---|---|---|---|---|---|")
    for bits in arguments.bits:
        for name, (weight, hessian) in calibration.items():
            cells = row(name, bits, weight[: arguments.rows].contiguous(), hessian, evaluation[name][1])
            print(f"| {bits} | {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
