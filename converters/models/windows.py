"""The sliding windows of a model's blocks, by its config.json."""

from __future__ import annotations

from lqexport.converters.models.architecture import Architecture, Config
from lqexport.converters.models.hf_defaults import FULL, SLIDING
from lqexport.errors import UserError


def window(config: Config) -> int | None:
    """Returns the size of the sliding window in tokens; None where all blocks attend to the whole context."""
    if config.get("use_sliding_window") is False or SLIDING not in (config.get("layer_types") or [SLIDING]):
        return None
    return config.get("sliding_window")


def layer_types(period: int, layers: int) -> list[str]:
    """Returns `layer_types` of config.json where every `period`-th block attends to the whole context."""
    return [SLIDING if (layer + 1) % period else FULL for layer in range(layers)]


def window_period(engine: str, architecture: Architecture, config: Config) -> int | None:
    """Returns n where every n-th block attends to the whole context and the others to a sliding window.

    engine   name of the program that runs the model, for the message

    Returns None for an architecture whose windows llama.cpp ignores. Raises UserError if the blocks of config.json do
    not follow such a pattern, or have no windows where they must have some.
    """
    if architecture.needs_windows and window(config) is None:
        raise UserError(
            f"{engine} computes {architecture.classes[0]} with sliding windows in some blocks, and config.json has "
            "none."
        )
    if architecture.period is None or window(config) is None:
        return architecture.period and 1
    types = config.get("layer_types")
    if types is None:
        return int(config.get("sliding_window_pattern") or architecture.period)
    period = types.index(FULL) + 1 if FULL in types else len(types) + 1
    if types != layer_types(period, len(types)):
        raise UserError(f"{engine} has windows in all but every n-th block; layer_types of config.json is {types}.")
    return period
