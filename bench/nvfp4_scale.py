"""Compares what NVFP4 loses on some linears of a model with and without a scale for the whole matrix.

    python bench/nvfp4_scale.py MODEL --calibration FILE [--block 8] [--rows 96] [--shrink 1 8 16 32]

The weights of each linear are divided by each number of --shrink, since those of larger models are smaller. The loss is
that of the linear's outputs under its normalized second moments, solved by default. Prints Markdown: the standard
deviation of the weights, and for the method lean and plain rounding the loss with the scale over that without.
"""

from __future__ import annotations

from vectors import parser_of, problems

from lqexport.recipe import Recipe
from lqexport.solver.linear import solve_linear

WITHOUT, WITH = "gguf:NVFP4", "gguf-scaled:NVFP4"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--shrink", type=int, nargs="+", default=[1, 8, 16, 32])
    arguments = parser.parse_args()
    print("| linear | divided by | standard deviation | solved | rounded |\n|---|---|---|---|---|")
    for name, (weight, hessian) in problems(arguments).items():
        for divisor in arguments.shrink:
            smaller, ratios = weight / divisor, []
            for method in ("lean", "rtn"):
                settings = Recipe("model", WITHOUT, method=method).solver_settings
                losses = [
                    solve_linear(name, smaller, hessian, codec, settings).facts["loss"] for codec in (WITHOUT, WITH)
                ]
                ratios.append(losses[1] / losses[0])
            shown = " | ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"| {name} | {divisor} | {float(smaller.std()):.4f} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
