"""How dampening affects other texts: the output error of linears that were solved with different dampening.

    python bench/dampening.py MODEL --calibration FILE --evaluation FILE [FILE...] [--block 12] [--target gguf:Q4_0]
                              [--samples 64]

The script solves up to 192 rows of each linear of one block, with the full-precision prefix and normalized moments.
A cell has, for each evaluation text, the error divided by the error at a dampening of 0.05 of the mean. Prints
Markdown.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from torch import Tensor

from lqexport.calibration.collect import by_weight, forward_moments
from lqexport.calibration.sequences import load_calibration
from lqexport.formats.registry import codec_named
from lqexport.models.blocks import BlockModel
from lqexport.models.source import Source, open_source
from lqexport.recipe import Recipe
from lqexport.solver.cholesky import SHARE_OF_MEDIAN, usual_dampening
from lqexport.solver.linear import solve_linear

ROWS, HELD_OUT = 192, 24
OF_MEAN, OF_MEDIAN = (0.01, 0.2), (0.1, 0.25, 0.5, 1.0)
"""The dampenings: shares of the Hessian diagonal's mean and of its median."""


def moments(source: Source, text: str, samples: int, block: int) -> dict[str, Tensor]:
    """Returns the Hessians of a block's linears on one text, by weight name."""
    tokens = load_calibration(text, source.tokenizer(), samples=samples, sequence_length=512, seed=0).tokens
    model = BlockModel(source)
    *_, last = forward_moments(model, tokens, "normalized", wanted=lambda index, _: index == block, last=block)
    return by_weight(model, last)


def errors(weight: Tensor, hessian: Tensor, held_out: list[Tensor], recipe: Recipe) -> list[float]:
    """Solves a linear under `hessian` and returns its output error under each of the held-out Hessians."""
    solved = solve_linear("linear", weight, hessian, recipe.target, recipe.solver_settings)
    difference = torch.from_numpy(codec_named(solved.codec_name).decode(solved.planes, weight.shape[1])) - weight
    return [float((difference @ moments * difference).sum()) for moments in held_out]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", nargs="+", required=True)
    parser.add_argument("--block", type=int, default=12)
    parser.add_argument("--target", default="gguf:Q4_0")
    parser.add_argument("--samples", type=int, default=64)
    arguments = parser.parse_args()
    source, recipe = open_source(arguments.model), Recipe("none", arguments.target)
    with torch.no_grad():
        calibrated = moments(source, arguments.calibration, arguments.samples, arguments.block)
        held_out = [moments(source, text, HELD_OUT, arguments.block) for text in arguments.evaluation]
    heads = [f"{share:g} of mean" for share in OF_MEAN] + [f"{share:g} of median" for share in OF_MEDIAN]
    print(f"| linear | median / mean | {' | '.join(heads)} |\n|---{'|---' * (1 + len(heads))}|")
    for name, hessian in calibrated.items():
        weight = source.read(name).float()[:ROWS]
        ratio = usual_dampening(hessian.diagonal()) / SHARE_OF_MEDIAN

        def at(dampening: float, name: str = name, weight: Tensor = weight, hessian: Tensor = hessian) -> list[float]:
            return errors(
                weight, hessian, [hessians[name] for hessians in held_out], replace(recipe, dampening=dampening)
            )

        base, cells = at(0.05), []
        for dampening in (*OF_MEAN, *(share * ratio for share in OF_MEDIAN)):
            pairs = zip(at(dampening), base, strict=True)
            cells.append(" / ".join(f"{error / usual:.3f}" for error, usual in pairs))
        print(f"| {name.removesuffix('.weight')} | {ratio:.2f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
