"""Compares types chosen for a size with llama.cpp's mixes of the same size. The same solver solves both.

    python bench/budget.py MODEL --calibration FILE --evaluation FILE --work FOLDER [--sizes Q4_K_M Q3_K_M]

For each mix, the script quantizes the mix itself and `--target gguf:auto --size MIX`. Both use the same guided moments
of the full-precision prefix, without tuning. lqexport's own float32 forward pass judges them in windows of 512 tokens,
whose second half is scored. Finished artifacts in FOLDER are reused. Prints Markdown.
"""

from __future__ import annotations

from pathlib import Path

from common import comparison_parser
from judging import Judge

from lqexport.models.source import open_source
from lqexport.models.written import open_export
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import AUTO, Recipe
from lqexport.runtime.environment import choose_device


def main() -> None:
    parser = comparison_parser(__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", default=["Q4_K_M", "Q3_K_M"])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--compute-dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--windows", type=int, default=12)
    arguments = parser.parse_args()
    judge = Judge(open_source(arguments.model), arguments.evaluation, arguments.windows, choose_device("auto"))
    print("| size of | types | MB | mean KL | perplexity | same top-1 |\n|---|---|---|---|---|---|", flush=True)
    for size in arguments.sizes:
        for label, target, limit in (("the mix", f"gguf:{size}", None), ("chosen", AUTO, size)):
            recipe = Recipe(arguments.model, target, calibration=arguments.calibration, samples=arguments.samples,
                            compute_dtype=arguments.compute_dtype, prefix="full", size=limit, tune=0)  # fmt: skip
            out = arguments.work / f"{size}-{label.replace(' ', '-')}"
            report = quantize(recipe, out, cache=arguments.work / "cache")
            result, nbytes = judge(open_export(out)), sum(tensor["bytes"] for tensor in report["tensors"])
            figures = (
                f"{result.kl:.4f} ± {result.kl_error:.4f} | {result.perplexity:.2f} ± {result.perplexity_error:.2f}"
            )
            print(f"| {size} | {label} | {nbytes / 1e6:.2f} | {figures} | {result.top1:.1%} |", flush=True)


if __name__ == "__main__":
    main()
