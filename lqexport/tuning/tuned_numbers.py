"""The floating-point numbers that a solved tensor's grid is made of, which tuning changes while the codes stay."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lqexport.formats.codec import Grid, Rounding, Sections
from lqexport.grids.grid import TensorGrid
from lqexport.grids.rotation import TensorWalks
from lqexport.grids.sections import TensorSections
from lqexport.tuning.tensor_cache import Unpacked

State = dict[str, Tensor]
"""Tensors by name."""


def numbers(grid: TensorGrid | TensorSections | TensorWalks) -> State:
    """Returns the float16 numbers that a grid is made of, as float32, by name.

    The names are `scale` and `offset`, `levels` for tables, `sections`, or `inputs` and `outputs` for walks.
    """
    if isinstance(grid, TensorWalks):
        return {"inputs": grid.inputs, "outputs": grid.outputs}
    if isinstance(grid, TensorSections):
        return {"sections": grid.numbers()}
    if grid.scale is None:
        return {"levels": grid.levels}
    stored = {"scale": grid.scale, "offset": grid.offset}
    # A float of few bits cannot change by a little, so it is not tuned.
    return {name: each.supers for name, each in stored.items() if each is not None and not each.format.floats.coarse}


def with_numbers(grid: TensorGrid, new: State) -> TensorGrid:
    """Returns the grid with other numbers in the place of `numbers(grid)`."""
    if "levels" in new:
        return replace(grid, levels=new["levels"])
    scale, offset = (
        replace(stored, supers=new[name]) if stored and name in new else stored
        for name, stored in (("scale", grid.scale), ("offset", grid.offset))
    )
    return replace(grid, scale=scale, offset=offset)


def tuned_values(grid: TensorGrid | TensorSections | TensorWalks, codes: Tensor, new: State) -> Tensor:
    """Returns the grid's values with other numbers. The values have gradients with respect to these numbers."""
    if isinstance(grid, TensorWalks):
        return TensorWalks(**new).values(codes)
    if isinstance(grid, TensorSections):
        return grid.with_numbers(new["sections"]).straight_through(codes)
    moved = with_numbers(grid, new)
    if not grid.rounding.by_steps:
        return moved.values(codes)
    return straight_through(replace(moved, rounding=Rounding.NONE).values(codes), moved.values(codes))


def straight_through(exact: Tensor, rounded: Tensor) -> Tensor:
    """Returns rounded values whose gradient is that of the exact ones."""
    return exact + (rounded - exact).detach()


def unit(name: str, values: Tensor) -> Tensor:
    """Returns the unit in which changes are counted.

    It is the scale, offset or maximum itself, the standard deviation of a row's table, or a vector's mean magnitude.
    """
    if name == "levels":
        return values.std(1, keepdim=True)
    return values.abs().mean() if name == "vector" else values


def with_stored(unpacked: Unpacked, new: State) -> tuple[Grid | Sections, NDArray[np.uint8]]:
    """Returns the format's grid with the tuned numbers, and its codes."""
    grid, codes = unpacked.grid, unpacked.codes
    assert isinstance(grid, TensorGrid | TensorSections)
    if isinstance(grid, TensorSections):
        return grid.with_numbers(new["sections"]).stored().numpy(), codes.cpu().numpy()
    tuned, codes = with_numbers(grid, new).ascending(codes)
    return tuned.numpy(), codes.cpu().numpy()
