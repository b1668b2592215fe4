"""How much of the evaluation text a file is measured on."""

from __future__ import annotations

from typing import Any

from lqexport.converters.models.architectures import architecture_of

WINDOWS, SENTENCES = 16, 256
"""Windows of the text by default, and sentences for an encoder: minutes for a small model, where a whole text takes
hours for a large one."""


def most_windows(windows: int | None, config: dict[str, Any]) -> int | None:
    """Returns the largest number of windows, or of sentences for an encoder; None for the whole text.

    windows   the number that was asked for: 0 for the whole text, None for `WINDOWS` or `SENTENCES`
    config    the model's config.json
    """
    if windows is None:
        return SENTENCES if architecture_of(config).encoder else WINDOWS
    return windows or None
