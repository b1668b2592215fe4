"""Says of the name of a model whether it can be one, without importing what reads models."""

from __future__ import annotations

import re
from pathlib import Path

from lqexport.converters.gguf.split import is_gguf
from lqexport.errors import UserError

HUB_ID = re.compile(r"(\w([\w.-]*\w)?/)?\w([\w.-]*\w)?")
"""Matches what may be a model's id on the hub. The hub's client has more rules."""


def check_source_name(name: str) -> None:
    """Raises UserError if a source is a .gguf file that is missing, or neither a folder nor in the form of a hub id."""
    path = Path(name)
    if is_gguf(path):
        if not path.is_file():
            raise UserError(f"There is no file {path}.")
    elif path.exists():
        if not path.is_dir():
            raise UserError(f"{path} is neither a model folder nor a .gguf file.")
    elif not HUB_ID.fullmatch(name):
        raise UserError(f"There is no folder {name}, and it is not a hub id either.")


def check_exists(*paths: Path) -> None:
    """Raises UserError if there is no file or folder at one of the paths."""
    for path in paths:
        if not path.exists():
            raise UserError(f"There is no file or folder {path}.")
