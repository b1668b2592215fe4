"""Chooses the dtype that the passes of a run on a CPU multiply in, where the recipe leaves it open.

CPUs with AVX512-BF16 or AMX multiply bfloat16 several times as fast as float32, and others some sixty times slower. So
a product of each is measured. Moments and targets stay sums in float32 of what the passes give. A model that was solved
on either loses the same (docs/experiments.md, "Passes in bfloat16").
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from lqexport.planning.cost import Work, operations_estimate
from lqexport.planning.rates import measured_rate
from lqexport.recipe import Recipe

FASTER = 2.0
"""Passes multiply in bfloat16 if that is so many times as fast as float32. No CPU is known near it: it is 4 with
AVX512-BF16, and 0.015 with AVX2. So a run that is measured twice comes to the same choice."""
LEAST_OPERATIONS = 1e12
"""Passes of fewer operations, some ten seconds of one core, multiply in float32 on any machine."""


def bfloat16_ratio() -> float:
    """Returns how many times as fast as float32 this machine's CPU multiplies bfloat16."""
    return measured_rate("cpu", torch.bfloat16, 384, 0.1) / measured_rate("cpu", torch.float32, 384, 0.1)


def with_compute_dtype(work: Work, device_type: str, begun: dict[str, Any] | None) -> tuple[Recipe, str]:
    """Returns the recipe with the dtype of its passes, and a sentence on it for the user, or an empty one.

    begun   the recipe of the run that is to go on, as JSON values: its dtype is taken. None for a new run

    float32 stays open (None) in the recipe, as the device's default.
    """
    recipe = work.recipe
    if device_type != "cpu" or recipe.compute_dtype == "float32" or not work.calibrated:
        return recipe, ""
    if recipe.compute_dtype == "bfloat16":
        ratio = bfloat16_ratio()
        slow = f"This CPU multiplies bfloat16 at {ratio:.2g} times the speed of float32: leave out --compute-dtype."
        return recipe, slow if ratio < 1 else ""
    if begun is not None:
        return replace(recipe, compute_dtype=begun.get("compute_dtype")), ""
    if operations_estimate(work).passes < LEAST_OPERATIONS:
        return recipe, ""
    ratio = bfloat16_ratio()
    if ratio < FASTER:
        return recipe, ""
    fast = f"Passes multiply in bfloat16, which this CPU does {ratio:.1f} times as fast as float32."
    return replace(recipe, compute_dtype="bfloat16"), fast
