"""What a tokenizer.json in SentencePiece's manner does with spaces before it looks for tokens, and whether llama.cpp
can do the same. Letters are left alone there, except for a unigram model's precompiled replacements.

Known differences, all of them at the ends of a piece of text between special tokens: llama.cpp puts the space before
each of them where transformers may do so only before the first (`prepend_scheme` first) or where there is none yet
(`Metaspace`); and a unigram model's text of nothing but spaces, where they are not merged, gets no space before it.
"""

from __future__ import annotations

from typing import Any

from lqexport.converters.gguf.tokens import SPACE
from lqexport.errors import UserError

_FORMS = {
    ("metaspace",),
    ("space",),
    ("space", "words"),
    ("space", "metaspace"),
    ("prefix", "space"),
    ("strip", "merge", "metaspace"),
}
"""Steps, in their order, that llama.cpp does as well; `strip, merge` only for a unigram model."""

_STEPS: dict[str, dict[str, Any]] = {
    "prefix": {"type": "Prepend", "prepend": SPACE},
    "space": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    "strip": {"type": "Strip", "strip_left": False, "strip_right": True},
    "merge": {"type": "Replace", "pattern": {"Regex": " {2,}"}},
    # Words end where spaces begin, which no token of such a vocabulary goes over.
    "words": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"},
    "metaspace": {"type": "Metaspace", "replacement": SPACE},
}


def space_rules(tokenizer: dict[str, Any], *, unigram: bool) -> tuple[bool, bool]:
    """Whether a text gets a space before it, and whether runs of spaces become one. Raises UserError where a
    tokenizer.json changes or splits text otherwise than llama.cpp does."""
    steps = [step for part in ("normalizer", "pre_tokenizer") for step in flat_steps(tokenizer.get(part))]
    if unigram:
        steps = [step for step in steps if step.get("type") != "Precompiled"]
    kinds = tuple(_kind(step) for step in steps)
    merged = "merge" in kinds
    if (kinds and kinds not in _FORMS) or (merged and not unigram):
        raise UserError(
            "tokenizer.json changes or splits text before it looks for tokens in a way that llama.cpp does not "
            f"({', '.join(str(step.get('type')) for step in steps)})."
        )
    spaced = [step for step in steps if step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never"]
    prefix = bool(spaced) or "prefix" in kinds
    if merged and not prefix:
        raise UserError("tokenizer.json merges spaces and puts none before a text; llama.cpp then puts one there.")
    return prefix, merged


def flat_steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, one after the other. A sequence of none, as some versions of
    transformers write, does nothing."""
    if not step:
        return []
    parts = step.get("normalizers", step.get("pretokenizers"))
    return [step] if parts is None else [found for part in parts for found in flat_steps(part)]


def _kind(step: dict[str, Any]) -> str | None:
    return next((kind for kind, form in _STEPS.items() if all(step.get(key) == form[key] for key in form)), None)
