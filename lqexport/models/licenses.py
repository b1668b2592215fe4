"""Finds the license that a source states, so that a model card can repeat it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lqexport.models.source import GGUFSource, Source
from lqexport.models.source_view import folder_of, opened

KEYS = ("license", "license_name", "license_link")
"""Keys of a card's front matter, which GGUF files have as general.license, general.license.name and so on."""
LONGEST = 500
"""The most characters of a value; longer ones are no name or address."""


def license_of(source: Source) -> dict[str, str]:
    """Returns key of `KEYS` -> value, from the README.md of a folder or the metadata of a GGUF file.

    Empty if the source states no license.
    """
    if (folder := folder_of(source)) is not None:
        stated: dict[str, Any] = dict(_front_matter(folder / "README.md"))
    elif isinstance(file := opened(source), GGUFSource):
        stated = {key: file.metadata.get(f"general.{key.replace('_', '.')}") for key in KEYS}
    else:
        return {}
    return {key: value for key in KEYS if isinstance(value := stated.get(key), str) and value and len(value) <= LONGEST}


def _front_matter(card: Path) -> list[tuple[str, str]]:
    """Returns key and value of the lines `key: value` of a model card's front matter; none if there is no card."""
    if not card.is_file():
        return []
    text = card.read_text(encoding="utf-8", errors="replace")
    block = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    lines = re.findall(r"^(\w+):[ \t]+(\S.*?)[ \t]*$", block[1], re.MULTILINE) if block else []
    return [(key, value.strip("'\"")) for key, value in lines]
