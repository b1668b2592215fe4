"""Measures what GPTQ's layouts cost: the output error of real linears in each layout, beside a grid with a free offset.

    python bench/gptq_layouts.py MODEL --calibration FILE [--blocks 2] [--group 64]

The linears of the first blocks are solved with plain second moments of 8 x 512 tokens, by GPTQ's own method (`gptq`:
the range of each group, error feedback) and by lqexport's (`lean`). Prints Markdown: the output error divided by the
output's energy, as the geometric mean over the linears.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from lqexport.calibration.collect import by_weight, embed, forward_moments
from lqexport.calibration.sequences import load_calibration
from lqexport.formats.codec import bits_per_weight
from lqexport.formats.registry import codec_named
from lqexport.models.blocks import BlockModel
from lqexport.models.source import open_source
from lqexport.recipe import Recipe
from lqexport.solver.linear import solve_linear

METHODS = ("gptq", "lean")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--group", type=int, default=64)
    arguments = parser.parse_args()
    base = f"gptq:4-g{arguments.group}"
    names = [f"native:affine-4-g{arguments.group}", base, f"{base}-act", f"{base}-sym", f"{base}-sym-act"]
    source = open_source(arguments.model)
    tokens = load_calibration(arguments.calibration, source.tokenizer(), samples=8, sequence_length=512, seed=0).tokens
    model = BlockModel(source)
    errors: dict[tuple[str, str], list[float]] = {(name, method): [] for name in names for method in METHODS}
    with torch.no_grad():
        for block in forward_moments(
            model, embed(model, tokens), "plain", wanted=lambda *_: True, last=arguments.blocks - 1
        ):
            for name, hessian in by_weight(model, block).items():
                for codec_name, method in errors:
                    recipe = Recipe(arguments.model, codec_name, method=method)
                    solved = solve_linear(name, source.read(name).float(), hessian, codec_name, recipe.solver_settings)
                    errors[codec_name, method].append(solved.facts["relative_error"])
    print(f"| {arguments.group} columns a group | bits | {' | '.join(METHODS)} |\n|---|---|---|---|")
    for name in names:
        means = (f"{np.exp(np.mean(np.log(errors[name, method]))):.5f}" for method in METHODS)
        print(f"| {name} | {bits_per_weight(codec_named(name), 1536, 576):.3f} | {' | '.join(means)} |")


if __name__ == "__main__":
    main()
