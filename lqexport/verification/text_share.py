"""How much of the evaluation text a file is measured on, and whether there is enough of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lqexport.calibration.texts import Text
from lqexport.converters.models.architectures import architecture_of
from lqexport.evaluation.embeddings import sentences
from lqexport.evaluation.fitting import fitted
from lqexport.evaluation.protocols import PROTOCOLS, cut_text
from lqexport.models.source import Source

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


def check_text(text: Text, source: Source, protocols: Sequence[str], windows: int | None) -> None:
    """Raises UserError if a text is too short to measure a model like the source on, or the source has no tokenizer.

    protocols, windows   those of `verify`
    """
    if architecture_of(source.config).encoder:
        sentences(text.content, most_windows(windows, source.config))
    else:
        cut_text(source.tokenizer(), text, [fitted(PROTOCOLS[name], source.config) for name in protocols], 1)
