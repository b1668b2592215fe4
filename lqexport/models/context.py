"""How many tokens a model can see at once: the positions that it has learned, or those that it was trained on."""

from __future__ import annotations

from typing import Any

from lqexport.converters.models.architectures import architecture_of, normalized


def trained_positions(config: dict[str, Any]) -> int | None:
    """Returns the number of positions that a model of this config.json was trained on; None if it does not say."""
    return int(normalized(config).get("max_position_embeddings") or 0) or None


def learned_positions(config: dict[str, Any]) -> int | None:
    """Returns the number of positions of a model that has learned a vector for each; None for any other model.

    Such a model, a GPT-2 for example, cannot run on more tokens. A model that rotates queries and keys can.
    """
    return None if architecture_of(config).rope_types else trained_positions(config)
