"""Measures what refinement costs for one linear.

Processor seconds of the default solver, and of one pass of error feedback.

    python bench/solver_cost.py [--rows 768] [--columns 2048] [--targets gguf:Q4_K ...]

Weights are random. Inputs are random too, with different energies and correlated neighbouring columns. The loss is that
of the default solver divided by that of the one pass. OMP_NUM_THREADS and NUMBA_NUM_THREADS set the threads. Prints
Markdown.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch
from torch import Tensor

from lqexport.recipe import Recipe
from lqexport.solver.linear import solve_linear

TARGETS = ("gguf:Q2_K", "gguf:Q3_K", "gguf:Q4_K", "gguf:Q5_K", "gguf:Q6_K", "gguf:IQ4_XS", "gguf:Q4_0",
           "native:table-2", "native:table-3", "native:table-4", "native:affine-4-g64", "gptq:4-g128",
           "exl2:3g32x{groups}", "exl2:5g32x{groups}")  # fmt: skip


def problem(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Returns random weights [rows, columns] and second moments [columns, columns]."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(4 * columns, columns, generator=draw) * torch.rand(columns, generator=draw) * 3
    inputs[:, 1:] += 0.5 * inputs[:, :-1]
    return torch.randn(rows, columns, generator=draw), inputs.T @ inputs / len(inputs)


def solved(weight: Tensor, hessian: Tensor, target: str, recipe: Recipe) -> tuple[float, float]:
    """Solves a linear. Returns processor seconds and loss."""
    began = time.process_time()
    tensor = solve_linear("linear", weight, hessian, target, recipe.solver_settings)
    return time.process_time() - began, tensor.facts["loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=768)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    arguments = parser.parse_args()
    weight, hessian = problem(arguments.rows, arguments.columns)
    recipe = Recipe("none", "gguf:Q4_K")
    print("| type | one pass, s | default, s | ratio | loss |\n|---|---|---|---|---|")
    for name in arguments.targets:
        target = name.format(groups=arguments.columns // 32)
        solve_linear("linear", weight[:32], hessian, target, recipe.solver_settings)  # compiles the kernels
        (once, before), (refined, after) = (
            solved(weight, hessian, target, replace(recipe, descent=descent)) for descent in (0, recipe.descent)
        )
        print(f"| {target} | {once:.2f} | {refined:.2f} | {refined / once:.2f} | {after / before:.3f} |", flush=True)


if __name__ == "__main__":
    main()
