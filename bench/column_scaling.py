"""Measures what scaling the columns before solving would gain (AWQ, SmoothQuant).

Prints the solved loss divided by the unscaled one.

    python bench/column_scaling.py MODEL --calibration FILE [--samples 8] [--targets gguf:Q2_K gguf:Q4_K]

A column's scale can be folded into the norm or linear before it, so a file can hold the scaled weights at no cost. The
script tries powers of the square root of a column's importance H_jj (AWQ) and of its root mean square weight, with
guided second moments, on every linear of the middle block. Prints Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from lqexport.calibration.collect import by_weight
from lqexport.calibration.guided import guided_moments
from lqexport.calibration.sequences import load_calibration
from lqexport.models.blocks import BlockModel
from lqexport.models.source import Source, open_source
from lqexport.recipe import Recipe
from lqexport.runtime.progress import Silent
from lqexport.solver.linear import solve_linear

POWERS = [(0.1, 0.0), (0.2, 0.0), (0.5, 0.0), (1.0, 0.0), (0.0, -0.5), (0.0, -1.0), (0.2, -1.0)]
"""Pairs of powers: of the square root of H_jj, and of the root mean square of the column's weights."""


def middle_block(source: Source, calibration: str, samples: int) -> dict[str, Tensor]:
    """Returns the guided second moments of the middle block's linears, by weight name."""
    model = BlockModel(source)
    tokens = load_calibration(calibration, source.tokenizer(), samples=samples, sequence_length=512, seed=0).tokens
    with tempfile.TemporaryDirectory() as work:
        for block in guided_moments(model, tokens, output_groups=1, folder=Path(work), listener=Silent()):
            if block[0] == len(model) // 2:
                return by_weight(model, block)
    raise AssertionError


def relative(values: Tensor) -> Tensor:
    """Returns the values divided by their geometric mean, or 1 for those that are not positive."""
    known = values > 0
    return torch.where(known, values / values[known].log().mean().exp(), 1.0)


def loss(name: str, weight: Tensor, hessian: Tensor, target: str, powers: tuple[float, float]) -> float:
    """Returns the loss after solving the scaled weights with the second moments of the scaled inputs."""
    importance, size = relative(hessian.diagonal().sqrt()), relative(weight.square().mean(0).sqrt())
    scale = importance.pow(powers[0]) * size.pow(powers[1])
    scaled = hessian / scale / scale[:, None]
    solved = solve_linear(name, weight * scale, scaled, target, Recipe("", target, descent=1).solver_settings)
    return float(solved.facts["loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--targets", nargs="+", default=["gguf:Q2_K", "gguf:Q4_K"])
    arguments = parser.parse_args()
    source = open_source(arguments.model)
    heads = " | ".join(f"H^{a:g} w^{b:g}" for a, b in POWERS)
    print(f"| linear | type | {heads} |\n|---|---{'|---' * len(POWERS)}|")
    with torch.no_grad():
        for name, hessian in middle_block(source, arguments.calibration, arguments.samples).items():
            weight = source.read(name).float()
            for target in arguments.targets:
                plain = loss(name, weight, hessian, target, (0.0, 0.0))
                ratios = [loss(name, weight, hessian, target, powers) / plain for powers in POWERS]
                cells = " | ".join(f"{ratio:.3f}" for ratio in ratios)
                print(f"| {name.removesuffix('.weight')} | {target} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
