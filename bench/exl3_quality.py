"""Judges EXL3 folders of several sizes against the source, beside the recipe of ExLlamaV3's converter and GGUF files.

    python bench/exl3_quality.py MODEL --calibration FILE --evaluation FILE [--also FILE] --work FOLDER
        [--bits 2 3 4] [--methods converter even lqexport] [--gguf IQ3_XXS] [-- OPTIONS OF lqexport quantize]

converter   the recipe of version 1.6.5 for one linear (`converted` of bench/exl3_linears.py) on plain second moments of
            inputs that come through the quantized blocks, the same K in all linears
even        lqexport's default, the same K in all linears
lqexport    lqexport's default, which chooses K for each linear (`--bits`)

All have an output of 6 bits and an embedding in float16, and see the same calibration tokens. Folders and files are
judged by lqexport's own forward pass, in 12 windows of each text. What FOLDER holds is not made again. Prints Markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from unittest import mock

import torch
from common import comparison_parser, solved, split_arguments, written_bytes
from exl3_linears import converted
from judging import Judge
from torch import Tensor

from lqexport.evaluation.evaluate import Evaluation
from lqexport.exporting import export
from lqexport.formats.trellis import Trellis, Walks
from lqexport.models.source import open_source
from lqexport.models.written import open_export
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.solver import linear

HEAD_BITS = 6


def by_converter(model: str, bits: str, calibration: str, samples: int, out: Path) -> Path:
    """Makes a folder by the converter's recipe, unless it exists."""

    def solve(trellis: Trellis, weight: Tensor, hessian: Tensor | None, *rest: object) -> Walks:
        return converted(trellis, weight, torch.eye(weight.shape[1]) if hessian is None else hessian)

    recipe = Recipe(
        model, f"exl3:{bits}", calibration=calibration, samples=samples, moments="plain", prefix="quantized",
        asymmetric=False, tune=0, head_bits=HEAD_BITS, compute_dtype="float32",
    )  # fmt: skip
    if not out.exists():
        with mock.patch.object(linear, "solve_walks", solve):
            artifact = out.with_name(f"{out.name}-artifact")
            quantize(recipe, artifact)
        export(artifact, out)
    return out


def folder_of(method: str, bits: str, arguments: argparse.Namespace, options: list[str]) -> Path:
    """Returns the folder of a method, which is made unless it exists."""
    out = arguments.work / f"{method}-{bits}"
    if method == "converter":
        return by_converter(arguments.model, bits, arguments.calibration, arguments.samples, out)
    target = ["exl3", "--bits", bits] if method == "lqexport" else [f"exl3:{bits}"]
    target += ["--head-bits", str(HEAD_BITS), *calibrated(arguments)]
    return solved(arguments.model, out, "to-exl3", ["--target", *target, *options])


def calibrated(arguments: argparse.Namespace) -> list[str]:
    """Returns the options of `quantize` that say what to calibrate on."""
    return ["--calibration", arguments.calibration, "--samples", str(arguments.samples)]


def figures(judged: Evaluation) -> str:
    return f"{judged.kl:.4f} ± {judged.kl_error:.4f} | {judged.perplexity:.2f} | {judged.top1:.1%}"


def main() -> None:
    parser = comparison_parser(__doc__)
    parser.add_argument("--also", help="another text to evaluate on")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--bits", nargs="+", default=["2", "3", "4"])
    parser.add_argument("--methods", nargs="+", default=["converter", "even", "lqexport"])
    parser.add_argument("--gguf", nargs="*", default=[])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=12)
    arguments, options = split_arguments(parser)
    arguments.work.mkdir(parents=True, exist_ok=True)
    source = open_source(arguments.model)
    written = [(f"{bits} bits, {method}", folder_of(method, bits, arguments, options))
               for bits in arguments.bits for method in arguments.methods]  # fmt: skip
    for name in arguments.gguf:
        given = ["--target", f"gguf:{name}", *calibrated(arguments)]
        file = solved(arguments.model, arguments.work / f"{name}.gguf", "to-gguf", given)
        written.append((f"GGUF {name}", file))
    texts = [arguments.evaluation, *([arguments.also] if arguments.also else [])]
    judges = [Judge(source, text, arguments.windows) for text in texts]
    columns = " | ".join(f"mean KL, {Path(text).stem} | perplexity | same top-1" for text in texts)
    print(f"| made by | MB | {columns} |\n|---|---|{'---|---|---|' * len(texts)}")
    with torch.no_grad():
        for label, path in written:
            cells = " | ".join(figures(judge(open_export(path))) for judge in judges)
            print(f"| {label} | {written_bytes(path) / 1e6:.1f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
