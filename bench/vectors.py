"""Compares what i-quants lose on some linears of a model: llama.cpp's quantizer, and the steps of lqexport's solver.

    python bench/vectors.py MODEL --calibration FILE [--block 8] [--rows 96] [--types IQ3_XXS IQ2_XS]

The loss is that of the linear's outputs under its second moments (docs/solver.md), over the loss of llama.cpp's
quantizer (by libgguf) with an importance matrix, the diagonal of the second moments. For each type and linear it prints
what is left by rounding to the nearest vectors on the fitted grid, by error feedback, and by descent, as well as the
processor seconds per million weights in one thread, beside Q4_K's. Prints Markdown.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import gguf
import libgguf
import numpy as np
import torch
from torch import Tensor

from lqexport.calibration.moments import SecondMoments
from lqexport.calibration.sequences import load_calibration
from lqexport.formats.gguf_vectors import GGUF_VECTORS
from lqexport.formats.registry import codec_named
from lqexport.grids.fit import fit
from lqexport.models.blocks import BlockModel
from lqexport.models.source import Source, open_source
from lqexport.recipe import Moments, Recipe
from lqexport.runtime.placement import all_on_device
from lqexport.solver.cholesky import CholeskyFactor
from lqexport.solver.feedback import layer_loss
from lqexport.solver.linear import factor_of, solve_linear, unit_of

LINEARS = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
SETTINGS = Recipe("model", "gguf:Q4_K").solver_settings


def block_linears(
    source: Source, tokens: Tensor, index: int, names: tuple[str, ...], moments_type: Moments
) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns the weights of linears of a block, and the second moments of their inputs for tokens [samples, length].

    Ends the script if the model has no such block.
    """
    model = BlockModel(source)
    hidden = [model.start(ids[None]) for ids in tokens]
    for number, block in model.blocks():
        linears = {name: block.get_submodule(name) for name in names} if number == index else {}
        moments = {name: SecondMoments(linear.in_features, moments_type, torch.device("cpu"))
                   for name, linear in linears.items()}  # fmt: skip
        for name, linear in linears.items():
            linear.register_forward_pre_hook(lambda _, inputs, add=moments[name].add: add(inputs[0].flatten(0, -2)))
        with torch.no_grad():
            hidden = [model.run(block, state) for state in hidden]
        if linears:
            return {name: (linear.weight.detach().float(), moments[name].hessian())
                    for name, linear in linears.items()}  # fmt: skip
    raise SystemExit(f"The model has no block {index}.")


def parser_of(text: str | None) -> argparse.ArgumentParser:
    """Returns a parser of the options that choose linears of a model; `text` is the script's documentation."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--block", type=int, default=8)
    parser.add_argument("--rows", type=int, default=96)
    return parser


def problems(arguments: argparse.Namespace) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns the first rows of each linear of the block, and its normalized second moments."""
    source = open_source(arguments.model)
    tokens = load_calibration(arguments.calibration, source.tokenizer(), samples=16, sequence_length=512, seed=0).tokens
    linears = block_linears(source, tokens, arguments.block, LINEARS, "normalized")
    return {name: (weight[: arguments.rows].contiguous(), hessian) for name, (weight, hessian) in linears.items()}


def llamacpp_loss(type_name: str, weight: Tensor, hessian: Tensor) -> float:
    """Returns the loss that llama.cpp's quantizer leaves with an importance matrix."""
    matrix = hessian.diagonal().numpy().copy()
    blocks = libgguf.quantize_rows(weight.numpy(), gguf.GGMLQuantizationType[type_name], imatrix=matrix)
    planes = {"blocks": np.ascontiguousarray(blocks).reshape(len(weight), -1)}
    values = torch.from_numpy(codec_named(f"gguf:{type_name}").decode(planes, weight.shape[1]))
    return layer_loss(values - weight, hessian)


def timed(solve: Callable[[], dict[str, float]]) -> tuple[float, float]:
    """Returns the loss that a second run leaves, and its processor seconds: the first one compiles."""
    solve()
    began = time.process_time()
    loss = solve()["loss"]
    return loss, time.process_time() - began


def row(name: str, type_name: str, weight: Tensor, hessian: Tensor, factor: CholeskyFactor) -> str:
    """Returns the losses of a type's steps over llama.cpp's, and the seconds per million weights, as table cells."""
    codec = codec_named(f"gguf:{type_name}")
    grid = fit(codec, weight, hessian.diagonal())
    nearest = layer_loss(grid.values(grid.nearest(weight)) - weight, hessian)
    fed = solve_linear(name, weight, hessian, codec.name, replace(SETTINGS, descent=0), None, factor).facts["loss"]
    loss, seconds = timed(lambda: solve_linear(name, weight, hessian, codec.name, SETTINGS, None, factor).facts)
    theirs = llamacpp_loss(type_name, weight, hessian)
    shares = " | ".join(f"{share / theirs:.3f}" for share in (nearest, fed, loss))
    return f"{shares} | {1e6 * seconds / weight.numel():.2f}"


def main() -> None:
    parser = parser_of(__doc__)
    names = [codec.name.removeprefix("gguf:") for codec in GGUF_VECTORS]
    parser.add_argument("--types", nargs="+", default=["Q4_K", *names])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| type | linear | nearest | feedback | descent | s per million weights |\n|---|---|---|---|---|---|")
    for name, (weight, hessian) in problems(arguments).items():
        for type_name in arguments.types:
            unit = unit_of([f"gguf:{type_name}"])
            factor = factor_of(name, hessian, SETTINGS, all_on_device(weight.device), unit)
            print(f"| {type_name} | {name} | {row(name, type_name, weight, hessian, factor)} |", flush=True)


if __name__ == "__main__":
    main()
