"""One linear from its weight and its Hessian to packed planes, by the recipe's method."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lqexport.artifact import StoredTensor
from lqexport.errors import UserError
from lqexport.fit import fit, minmax
from lqexport.fit_sections import fit_sections, minmax_sections
from lqexport.formats.codec import Grid, GridCodec, PlainCodec, Planes, SectionedCodec, Sections
from lqexport.formats.registry import codec as codec_named
from lqexport.grid import TensorGrid
from lqexport.moments import importance
from lqexport.recipe import Recipe
from lqexport.sections import TensorSections
from lqexport.solve import Factor, damped, factorize, feedback, layer_loss, refine
from lqexport.solve_exact import exact
from lqexport.solve_sections import refine_sections

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


def _rounded(codec: PlainCodec | GridCodec | SectionedCodec, matrix: Tensor) -> dict[str, np.ndarray]:
    if isinstance(codec, PlainCodec):
        return codec.encode_values(matrix.cpu().numpy())
    assert isinstance(codec, GridCodec)  # no plan rounds a tensor to EXL2 or GPTQ without solving it
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
    if isinstance(codec, PlainCodec):
        return round_tensor(name, weight, codec_name)
    hessians = [None] if hessian is None else list(hessian.reshape(-1, weight.shape[1], weight.shape[1]))
    assert len(hessians) == 1 or isinstance(codec, GridCodec)  # the planes of others have columns as rows
    runs = [_solve_rows(name, *pair, codec, recipe) for pair in zip(weight.chunk(len(hessians)), hessians, strict=True)]
    planes = {plane: np.concatenate([part[plane] for part, _ in runs]) for plane in runs[0][0]}
    return StoredTensor(name, codec_name, tuple(weight.shape), planes, _summed_facts([facts for _, facts in runs]))


def _solve_rows(
    name: str, weight: Tensor, hessian: Tensor | None, codec: GridCodec | SectionedCodec, recipe: Recipe
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


def _round_to_nearest(codec: GridCodec | SectionedCodec, weight: Tensor) -> tuple[TensorGrid | TensorSections, Tensor]:
    natural = torch.arange(weight.shape[1], device=weight.device)
    grid = minmax(codec, weight) if isinstance(codec, GridCodec) else minmax_sections(codec, weight, natural)
    return grid, grid.nearest(weight)


def _solve(
    codec: GridCodec | SectionedCodec, weight: Tensor, hessian: Tensor, recipe: Recipe
) -> tuple[TensorGrid | TensorSections, Tensor, float]:
    """Grid, codes, and the dampening that it took."""
    factor = factorize(hessian, recipe.dampening, recipe.act_order)
    if isinstance(codec, GridCodec):
        return *_solve_grid(codec, weight, hessian, factor, recipe), factor.dampening
    return *_solve_sections(codec, weight, hessian, factor, recipe), factor.dampening


def _solve_grid(
    codec: GridCodec, weight: Tensor, hessian: Tensor, factor: Factor, recipe: Recipe
) -> tuple[TensorGrid, Tensor]:
    if recipe.method == "gptq":
        grid = minmax(codec, weight)
    else:
        grid = fit(codec, weight, importance(hessian, factor, recipe.importance, recipe.exponent))
    codes = (exact if recipe.solver == "exact" else feedback)(weight, grid, factor)
    if recipe.method == "lean" and recipe.descent:
        return refine(weight, damped(hessian, factor.dampening), grid, codes, sweeps=recipe.descent, refit=True)
    return grid, codes


def _solve_sections(
    codec: SectionedCodec, weight: Tensor, hessian: Tensor, factor: Factor, recipe: Recipe
) -> tuple[TensorSections, Tensor]:
    """The same where columns may be stored in the order in which they are solved."""
    order = factor.order if codec.reorders else torch.arange(weight.shape[1], device=weight.device)
    if recipe.method == "gptq":
        grid = minmax_sections(codec, weight, order)
    else:
        weights = importance(hessian, factor, recipe.importance, recipe.exponent)
        grid = fit_sections(codec, weight, weights, order)
    codes = feedback(weight, grid, factor)
    if recipe.method == "lean" and recipe.descent:
        return refine_sections(weight, damped(hessian, factor.dampening), grid, codes, sweeps=recipe.descent)
    return grid, codes


def _pack(
    codec: GridCodec | SectionedCodec, grid: Grid | Sections, codes: np.ndarray, name: str
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Planes and the values that they decode to, which must be the grid's own, bit for bit."""
    planes = codec.encode(grid, codes)  # type: ignore[arg-type]  # a grid of this codec
    values = codec.decode(planes, grid.columns)
    if not np.array_equal(values.view(np.uint32), grid.values(codes).view(np.uint32)):
        raise AssertionError(
            f"{name}: {codec.name} decodes to other values than were solved. This is a bug in lqexport."
        )
    return planes, values
