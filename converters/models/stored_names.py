"""How a checkpoint calls the tensors of a model: with a prefix more, or with one less, than transformers' modules."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from lqexport.converters.models import further
from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.text_parts import RENAMED

_OF_A_WHOLE = re.compile("|".join(RENAMED))


def has_other_parts(names: Collection[str]) -> bool:
    """Returns whether a checkpoint's names show that its model is the text part of a larger one."""
    return any(_OF_A_WHOLE.match(name) for name in names)


def renaming(
    architecture: Architecture | None, names: Collection[str], *, whole: bool, layers: Any = None
) -> dict[str, str]:
    """Returns regular expression -> replacement; together they turn a checkpoint's names into those of the modules.

    whole   whether the checkpoint is of a model with a text part and other parts
    layers   number of decoder blocks, as config.json gives it

    A checkpoint of the model without its output, such as an embedding model's, lacks the first part of all names.
    """
    patterns = dict(RENAMED) if whole else {}
    if architecture is None:
        return patterns
    patterns |= architecture.renamed | further.renaming(architecture, layers, names)
    base = architecture.blocks.rpartition(".")[0] + "."
    if base == "." or any(renamed(name, patterns).startswith(base) for name in names):
        return patterns
    tops = (architecture.embedding, f"{architecture.blocks}.", f"{architecture.final_norm}.")
    beginnings = [re.escape(top.removeprefix(base)) for top in tops if top.startswith(base)]
    return patterns | {rf"^({'|'.join(beginnings)})": rf"{base}\1"}


def renamed(name: str, patterns: dict[str, str]) -> str:
    """Returns a checkpoint's name after all replacements of `renaming`."""
    for pattern, new in patterns.items():
        name = re.sub(pattern, new, name)
    return name
