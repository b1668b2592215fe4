"""Reads the calibration text of a run: the run itself, and before any work its dry run."""

from __future__ import annotations

from typing import Any

from lqexport.calibration.sequences import Calibration, load_calibration
from lqexport.calibration.texts import check_text, is_at_hand
from lqexport.converters.models.architectures import architecture_of
from lqexport.converters.plan import PlannedTensor
from lqexport.models.context import trained_positions
from lqexport.models.source import Source
from lqexport.planning.recipe_plan import calibrates
from lqexport.recipe import Recipe
from lqexport.tuning.tune import HELD_OUT


def read_calibration(recipe: Recipe, source: Source, planned: list[PlannedTensor]) -> Calibration | None:
    """Returns the calibration sequences of a run; None if nothing is solved.

    Raises UserError as `load_calibration` does, and if the source has no tokenizer.
    """
    if not calibrates(recipe, source, planned):
        return None
    return load_calibration(
        recipe.calibration, source.tokenizer(), samples=sequences_needed(recipe),
        sequence_length=recipe.sequence_length, seed=recipe.seed, encoder=architecture_of(source.config).encoder,
    )  # fmt: skip


def sequences_needed(recipe: Recipe) -> int:
    """Returns the number of calibration sequences that a run draws, also for tuning."""
    return max(recipe.samples, recipe.tuned_sequences + HELD_OUT) if recipe.tuned_sequences else recipe.samples


def calibration_at_hand(recipe: Recipe, source: Source, planned: list[PlannedTensor]) -> Calibration | None:
    """Returns what `read_calibration` does without the network: None for a text of the hub.

    Of such a text only the name and the split are checked, and that the source has a tokenizer.
    """
    if not calibrates(recipe, source, planned) or is_at_hand(recipe.calibration):
        return read_calibration(recipe, source, planned)
    source.tokenizer()
    check_text(recipe.calibration)
    return None


def calibration_warnings(recipe: Recipe, config: dict[str, Any], calibration: Calibration | None) -> list[str]:
    """Returns what is unusual about the calibration sequences of a model with this config.json, as sentences."""
    if calibration is None:
        return []
    trained = trained_positions(config)
    warnings: list[str] = []
    if trained is not None and recipe.sequence_length > trained:
        warnings.append(
            f"The model was trained on {trained} positions (max_position_embeddings), and calibration sequences have "
            f"{recipe.sequence_length} tokens: --sequence-length {trained} would calibrate on what it knows."
        )
    if calibration.repeats:
        count = sequences_needed(recipe)
        warnings.append(f"The text {recipe.calibration} is too short for {count} different sequences.")
    return warnings
