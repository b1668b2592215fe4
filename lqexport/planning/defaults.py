"""Chooses what a recipe leaves open: how second moments are collected, and whether the model is smoothed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

from lqexport.converters.models.architectures import architecture_of, normalized
from lqexport.models.modules import expected_shapes
from lqexport.models.smoothing import pairs
from lqexport.recipe import Effort, Recipe
from lqexport.sizes import size_bits

WIDEST = 16384
"""Asymmetric calibration is the default up to this number of inputs of a linear. Its sums are four square float32
matrices of that width, and as many again for a shard of the sequences."""


def settled(recipe: Recipe, config: dict[str, Any]) -> Recipe:
    """Returns the recipe for a model of this config.json, with nothing left open.

    Asymmetric calibration loses least (docs/experiments.md), so it is the default where it works: for models that
    predict tokens, have no experts, and whose second moments fit into memory. Choosing types or mixes needs guided
    moments. The effort `fast` takes what one pass of the source gives.
    """
    if recipe.imatrix:
        recipe = replace(recipe, asymmetric=False, prefix="full", moments="plain", smooth=False)
    asymmetric, prefix, moments, fast = recipe.asymmetric, recipe.prefix, recipe.moments, recipe.effort == "fast"
    if asymmetric is None:
        asymmetric = prefix != "full" and not fast and _works(recipe, config)
    if prefix is None:
        prefix = "quantized" if asymmetric else "full"
    if moments is None:
        guided = recipe.chooses_types and (prefix == "full" or asymmetric)
        moments = "guided" if guided or (prefix == "full" and not fast) else "normalized"
    bits = _bits(recipe, config)
    smooth = _smooth(recipe, config, bits) if recipe.smooth is None else recipe.smooth
    return replace(
        recipe, asymmetric=asymmetric, prefix=prefix, moments=moments, smooth=smooth, descent=recipe.sweeps,
        tune=recipe.tuning_for(bits) if recipe.tune is None else recipe.tune,
    )  # fmt: skip


def by_effort(recipe: Recipe, config: dict[str, Any]) -> dict[Effort, Recipe]:
    """Returns the settled recipe of each effort. Options that are given are those of every effort."""
    return {effort: settled(replace(recipe, effort=effort), config) for effort in get_args(Effort)}


def _bits(recipe: Recipe, config: dict[str, Any]) -> float | None:
    """Returns the bits per weight that are asked for: by `bits`, by a size, or by the target; None if by none."""
    if recipe.size is not None:
        return size_bits(recipe.size, lambda: sum(map(math.prod, expected_shapes(normalized(config)).values())))
    return recipe.named_bits


def _smooth(recipe: Recipe, config: dict[str, Any], bits: float | None) -> bool:
    """Returns whether the model is smoothed by default, which it is for GGUF types and sizes of 4 bits or more.

    With weights of 2 or 3 bits, llama.cpp's rounding of inputs costs little compared with the rounding of weights.
    """
    wide = recipe.parsed_target.family == "gguf" and (bits or 0) >= 4
    return wide and recipe.method != "rtn" and bool(pairs(architecture_of(config), 1))


def _works(recipe: Recipe, config: dict[str, Any]) -> bool:
    """Returns whether asymmetric calibration works with the rest of the recipe and the model."""
    architecture, usual = architecture_of(config), normalized(config)
    widest = max(int(usual.get(key) or 0) for key in ("hidden_size", "intermediate_size"))
    apart = recipe.method == "rtn" or recipe.output_groups > 1 or recipe.factor_bytes
    return not (apart or architecture.experts or architecture.encoder) and widest <= WIDEST
