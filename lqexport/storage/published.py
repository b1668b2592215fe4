"""Names for what others will read: no path of this machine is written into a file that may be published."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
CACHED = re.compile(r"models--(\w[\w.-]*?)--(\w[\w.-]*)/snapshots/")
"""The part of a path in the hub's cache that holds the id of its model."""
ABSOLUTE = re.compile(r"(?<![\w.:/~])~?/(?:[^\s/'\"]+/)*([^\s/'\"]+)")
"""An absolute path within a sentence. What follows a word, a colon or a slash, as in an address, is none."""


def record_of(model: Path) -> Path:
    """Returns the folder in which `export` writes the record of a file or folder."""
    return model.with_name(f"{model.name}.record")


def is_hub_id(source: str) -> bool:
    """Returns whether a source is a repository of the hub, such as org/model, and no folder of this machine."""
    return HUB_ID.fullmatch(source) is not None and not Path(source).exists()


def public_name(source: str) -> str:
    """Returns how a source is called for others: a hub id stays, a local path becomes its last component.

    A folder of the hub's cache gets the id that it was downloaded by.
    """
    if is_hub_id(source):
        return source
    if cached := CACHED.search(f"{source}/"):
        return f"{cached[1]}/{cached[2]}"
    path = Path(source)
    return path.resolve().name if path.name in ("", "..") else path.name


def public_run(run: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of a run.json with public names for its source and its text."""
    run = dict(run)
    if recipe := run.get("recipe"):
        run["recipe"] = recipe | {
            name: name_of(str(recipe[name]))
            for name, name_of in (("source", public_name), ("calibration", _file_name), ("imatrix", _file_name))
            if recipe.get(name)
        }
    if calibration := run.get("calibration"):
        run["calibration"] = calibration | {"name": _file_name(str(calibration["name"]))}
    return run


def _file_name(text: str) -> str:
    return Path(text).name


def public_sentence(sentence: str, names: dict[str, str]) -> str:
    """Returns a sentence with public names in the place of paths.

    names   path -> public name, for paths that the sentence may hold, also with spaces or relative
    """
    for path in sorted(names, key=len, reverse=True):
        if "/" in path:
            sentence = sentence.replace(path, names[path])
    return ABSOLUTE.sub(r"\1", sentence)
