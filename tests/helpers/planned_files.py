"""The check of a run's GGUF file before the run."""

from __future__ import annotations

from lqexport.models.source import Source
from lqexport.planning.file_check import check_file
from lqexport.planning.recipe_plan import plan_recipe
from lqexport.recipe import Recipe


def said_before_work(source: Source) -> list[str]:
    """Returns what `check_file` says of a source's file in Q8_0."""
    recipe = Recipe(source.name, "gguf:Q8_0")
    return check_file(source, recipe, plan_recipe(source, recipe))
