"""One linear from its weight and its Hessian to packed planes, by the recipe's method."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lqexport.artifact import StoredTensor
from lqexport.errors import UserError
from lqexport.fit import fit, minmax
from lqexport.formats.codec import Grid, GridCodec, PlainCodec, Planes
from lqexport.formats.registry import codec as codec_named
from lqexport.grid import TensorGrid
from lqexport.moments import importance
from lqexport.recipe import Recipe
from lqexport.solve import damped, factorize, feedback, layer_loss, refine

ROUND_CHUNK = 1 << 24
"""Weights rounded at once, so that a large embedding needs little memory."""


def check_finite(name: str, weight: Tensor) -> None:
    """Raises UserError where a weight is NaN or infinite."""
    if not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise UserError(
            f"{name} has {bad} NaN or infinite weights in the source. The checkpoint is broken; get it again."
        )


def round_tensor(name: str, weight: Tensor, codec_name: str) -> StoredTensor:
    """A tensor that no solver works on (embeddings, norms, biases), each weight rounded to its format."""
    check_finite(name, weight)
    codec = codec_named(codec_name)
    matrix = weight.reshape(1, -1) if weight.ndim == 1 else weight
    parts = [_rounded(codec, part.float()) for part in matrix.split(max(1, ROUND_CHUNK // matrix.shape[1]))]
    planes = {plane: np.concatenate([part[plane] for part in parts]) for plane in parts[0]}
    return StoredTensor(name, codec_name, tuple(weight.shape), planes)


def _rounded(codec: PlainCodec | GridCodec, matrix: Tensor) -> dict[str, np.ndarray]:
    if not isinstance(codec, GridCodec):
        return codec.encode_values(matrix.cpu().numpy())
    grid = fit(codec, matrix, torch.ones(matrix.shape[1], device=matrix.device))
    return codec.encode(grid.numpy(), grid.nearest(matrix).cpu().numpy())


def solve_linear(name: str, weight: Tensor, hessian: Tensor | None, codec_name: str, recipe: Recipe) -> StoredTensor:
    """Quantize float32 `weight` [R, C] for inputs with second moments `hessian` (None: method rtn): [C, C], or
    [G, C, C], one for each of G equal runs of rows.

    The facts of the result: `loss` (summed squared output error per token), `relative_error` (to the output's energy),
    `weight_error` (relative, squared), and the dampening that the factorization took.
    """
    check_finite(name, weight)
    codec = codec_named(codec_name)
    if not isinstance(codec, GridCodec):
        return round_tensor(name, weight, codec_name)
    hessians = [None] if hessian is None else list(hessian.reshape(-1, weight.shape[1], weight.shape[1]))
    runs = [_solve_rows(name, *pair, codec, recipe) for pair in zip(weight.chunk(len(hessians)), hessians, strict=True)]
    planes = {plane: np.concatenate([part[plane] for part, _ in runs]) for plane in runs[0][0]}
    return StoredTensor(name, codec_name, tuple(weight.shape), planes, _summed_facts([facts for _, facts in runs]))


def _solve_rows(
    name: str, weight: Tensor, hessian: Tensor | None, codec: GridCodec, recipe: Recipe
) -> tuple[Planes, dict[str, float]]:
    """Planes of some rows, and sums over them from which the facts are made."""
    sums: dict[str, float] = {}
    if hessian is None or recipe.method == "rtn":
        grid, codes = _round_to_nearest(codec, weight)
    else:
        grid, codes, sums["dampening"] = _solve(codec, weight, hessian, recipe)
    planes, values = _pack(codec, grid.numpy(), codes.cpu().numpy(), name)
    difference = torch.from_numpy(values).to(weight.device) - weight
    sums |= {"weight_error": float(difference.square().sum()), "weight": float(weight.square().sum())}
    if hessian is not None:
        sums |= {"loss": layer_loss(difference, hessian), "energy": layer_loss(weight, hessian)}
    return planes, sums


def _summed_facts(runs: list[dict[str, float]]) -> dict[str, Any]:
    total = {key: sum(run[key] for run in runs) for key in runs[0]}
    facts = {"weight_error": total["weight_error"] / max(total["weight"], 1e-30)}
    if "loss" in total:
        facts |= {"loss": total["loss"], "relative_error": total["loss"] / max(total["energy"], 1e-30)}
    if "dampening" in total:
        facts["dampening"] = max(run["dampening"] for run in runs)
    return facts


def _round_to_nearest(codec: GridCodec, weight: Tensor) -> tuple[TensorGrid, Tensor]:
    grid = minmax(codec, weight)
    return grid, grid.nearest(weight)


def _solve(codec: GridCodec, weight: Tensor, hessian: Tensor, recipe: Recipe) -> tuple[TensorGrid, Tensor, float]:
    """Grid, codes, and the dampening that it took."""
    factor = factorize(hessian.double(), recipe.dampening, recipe.act_order)
    if recipe.method == "gptq":
        grid = minmax(codec, weight)
    else:
        grid = fit(codec, weight, importance(hessian, factor, recipe.importance, recipe.exponent))
    codes = feedback(weight, grid, factor)
    if recipe.method == "lean" and recipe.descent:
        grid, codes = refine(weight, damped(hessian, factor.dampening), grid, codes, sweeps=recipe.descent, refit=True)
    return grid, codes, factor.dampening


def _pack(codec: GridCodec, grid: Grid, codes: np.ndarray, name: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Planes and the values that they decode to, which must be the grid's own, bit for bit."""
    planes = codec.encode(grid, codes)
    values = codec.decode(planes, grid.columns)
    if not np.array_equal(values.view(np.uint32), grid.values(codes).view(np.uint32)):
        raise AssertionError(
            f"{name}: {codec.name} decodes to other values than were solved. This is a bug in lqexport."
        )
    return planes, values
