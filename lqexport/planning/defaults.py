"""What a recipe leaves to the model: how second moments are collected, and whether it is smoothed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lqexport.converters.models.architectures import architecture_of, normalized
from lqexport.models.smoothing import pairs
from lqexport.recipe import Recipe

WIDEST = 16384
"""Inputs of a linear up to which asymmetric calibration is the default: its sums are four matrices of them squared, in
float32, and as much again for a shard of the sequences."""


def settled(recipe: Recipe, config: dict[str, Any]) -> Recipe:
    """The recipe for a model of this config.json, with nothing left open. Asymmetric calibration keeps the most
    (docs/experiments.md), so it is what one gets where it works: models that predict tokens, without experts, whose
    second moments fit. Choosing types or mixes needs guided moments."""
    asymmetric, prefix, moments = recipe.asymmetric, recipe.prefix, recipe.moments
    if asymmetric is None:
        asymmetric = prefix != "full" and _works(recipe, config)
    if prefix is None:
        prefix = "quantized" if asymmetric else "full"
    if moments is None:
        moments = "guided" if prefix == "full" or (recipe.chooses_types and asymmetric) else "normalized"
    smooth = _smooth(recipe, config) if recipe.smooth is None else recipe.smooth
    return replace(recipe, asymmetric=asymmetric, prefix=prefix, moments=moments, smooth=smooth)


def _smooth(recipe: Recipe, config: dict[str, Any]) -> bool:
    """For GGUF types of 4 bits or more: what llama.cpp loses by rounding inputs is little beside what weights of 2 or 3
    bits lose."""
    return (
        (recipe.parsed_target.gguf_bits or 0) >= 4
        and recipe.method != "rtn"
        and bool(pairs(architecture_of(config), 1))
    )


def _works(recipe: Recipe, config: dict[str, Any]) -> bool:
    """Whether asymmetric calibration goes with the rest of the recipe and the model."""
    architecture, usual = architecture_of(config), normalized(config)
    widest = max(int(usual.get(key) or 0) for key in ("hidden_size", "intermediate_size"))
    apart = recipe.method == "rtn" or recipe.output_groups > 1 or recipe.factor_bytes
    return not (apart or architecture.experts or architecture.encoder) and widest <= WIDEST
