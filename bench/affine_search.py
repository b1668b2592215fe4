"""Compares LeanQuant's affine grid search with lqexport's (`lqexport.grids.fit`), which must not lose to it.

    python bench/affine_search.py [--steps 256] [--group 64] [--rows 64]

For every group, the paper tries every pair of cuts (low, high) of the range. A cut is up to 0.4, 0.3 or 0.2 T steps at
2, 3 and 4 bits, and a step is 1 / T of the range. With the paper's T = 2048 that is 672,400 ranges per group at 2 bits;
--steps sets a smaller T. Prints Markdown: our weighted squared error divided by the paper's, and both times.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from lqexport.formats.registry import codec_named
from lqexport.grids.fit import fit

REACH = {2: 0.4, 3: 0.3, 4: 0.2}
"""The largest cut at each number of bits, as a share of T."""


def paper_search(groups: Tensor, importance: Tensor, bits: int, steps: int) -> Tensor:
    """Returns the least weighted squared error [R, G] over all pairs of cuts, for groups [R, G, g] and importance
    [G, g]."""
    low, high = groups.amin(2), groups.amax(2)
    step = (high - low) / steps
    best = torch.full_like(low, torch.inf)
    for cut_low in range(int(REACH[bits] * steps) + 1):
        for cut_high in range(int(REACH[bits] * steps) + 1):
            shift = low + cut_low * step
            scale = (high - cut_high * step - shift) / (2**bits - 1)
            best = torch.minimum(best, error_of(groups, importance, scale, shift, bits))
    return best


def error_of(groups: Tensor, importance: Tensor, scale: Tensor, shift: Tensor, bits: int) -> Tensor:
    """Returns the weighted squared error [R, G] of rounding each weight to scale * code + shift."""
    safe = torch.where(scale == 0, 1, scale)[..., None]
    code = ((groups - shift[..., None]) / safe).round().clamp(0, 2**bits - 1)
    return (importance * (groups - shift[..., None] - safe * code).square()).sum(-1)


def our_error(weights: Tensor, importance: Tensor, bits: int, group: int) -> Tensor:
    """Returns the weighted squared error [R, G] of the grid that `fit` stores, with its float16 rounding."""
    grid = fit(codec_named(f"native:affine-{bits}-g{group}"), weights, importance)
    scale, shift = grid.per_group(len(weights))
    groups, weight = weights.unflatten(1, (-1, group)), importance.unflatten(0, (-1, group))
    return error_of(groups, weight, scale, shift, bits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--group", type=int, default=64, choices=(32, 64, 128))
    parser.add_argument("--rows", type=int, default=64)
    arguments = parser.parse_args()
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(arguments.rows, 512, generator=draw) * torch.rand(arguments.rows, 1, generator=draw)
    importance = torch.rand(512, generator=draw).pow(4)
    our_error(weights, importance, 4, arguments.group)  # compiles the kernels before anything is timed
    print("| bits | our error / the paper's | the paper's seconds | our seconds |\n|---|---|---|---|")
    for bits in (2, 3, 4):
        groups = weights.unflatten(1, (-1, arguments.group))
        began = time.perf_counter()
        theirs = paper_search(groups, importance.unflatten(0, (-1, arguments.group)), bits, arguments.steps).sum()
        middle = time.perf_counter()
        ours = our_error(weights, importance, bits, arguments.group).sum()
        seconds = middle - began, time.perf_counter() - middle
        print(f"| {bits} | {float(ours / theirs):.4f} | {seconds[0]:.1f} | {seconds[1]:.3f} |", flush=True)


if __name__ == "__main__":
    main()
