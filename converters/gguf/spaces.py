"""Finds what a SentencePiece-like tokenizer.json does with spaces before it looks for tokens.

llama.cpp can do some of it; anything else is refused. Such a tokenizer does not change letters, except by a unigram
model's precompiled replacements.

Known differences remain at the ends of the pieces of text between special tokens. llama.cpp puts a space before each
piece; transformers may put one only before the first piece (`prepend_scheme` first), or only before a piece that does
not begin with a space (`Metaspace`). And a piece of nothing but spaces gets no space before it in llama.cpp, if the
model is a unigram model that does not merge spaces.
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
"""The sequences of steps that llama.cpp can do; the one with `strip` and `merge` only for a unigram model."""

_STEPS: dict[str, dict[str, Any]] = {
    "prefix": {"type": "Prepend", "prepend": SPACE},
    "space": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    "strip": {"type": "Strip", "strip_left": False, "strip_right": True},
    "merge": {"type": "Replace", "pattern": {"Regex": " {2,}"}},
    # This splits before spaces, and no token of such a vocabulary crosses from a letter to a space.
    "words": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"},
    "metaspace": {"type": "Metaspace", "replacement": SPACE},
}


def space_rules(tokenizer: dict[str, Any], *, unigram: bool) -> tuple[bool, bool]:
    """Returns whether a text gets a space before it, and whether runs of spaces become one.

    Raises UserError if tokenizer.json changes or splits text in a way that llama.cpp does not.
    """
    steps = [step for part in ("normalizer", "pre_tokenizer") for step in flat_steps(tokenizer.get(part))]
    if unigram:
        steps = [step for step in steps if step.get("type") != "Precompiled"]
    step_names = tuple(_step_name(step) for step in steps)
    merged = "merge" in step_names
    if (step_names and step_names not in _FORMS) or (merged and not unigram):
        raise UserError(
            "tokenizer.json changes or splits text before it looks for tokens in a way that llama.cpp does not "
            f"({', '.join(str(step.get('type')) for step in steps)})."
        )
    spaced = [step for step in steps if step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never"]
    prefix = bool(spaced) or "prefix" in step_names
    if merged and not prefix:
        raise UserError("tokenizer.json merges spaces and puts none before a text; llama.cpp then puts one there.")
    return prefix, merged


def flat_steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Returns the steps of a normalizer or pre-tokenizer, with nested sequences made flat.

    An empty sequence, as some versions of transformers write it, has no steps.
    """
    if not step:
        return []
    inner_steps = step.get("normalizers", step.get("pretokenizers"))
    return [step] if inner_steps is None else [leaf for inner in inner_steps for leaf in flat_steps(inner)]


def _step_name(step: dict[str, Any]) -> str | None:
    return next((name for name, form in _STEPS.items() if all(step.get(key) == form[key] for key in form)), None)
