"""Says of the name of a model whether it can be one, without importing what reads models."""

from __future__ import annotations

import re
from pathlib import Path

from lqexport.converters.gguf.split import is_gguf
from lqexport.errors import UserError, files_at_hand
from lqexport.runtime.hub import no_hub
from lqexport.storage.files import check_path

HUB_ID = re.compile(r"(\w([\w.-]*\w)?/)?\w([\w.-]*\w)?")
"""Matches what may be a model's id on the hub. The hub's client has more rules."""
HUB_ADDRESS = re.compile(r"(?:https?://)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)")
"""Matches the address of a model's page on the hub; the first group is its id."""
NO_ID = "There is no folder {}, and it is not a hub id either."
NOT_WITHIN_REACH = "There is no folder {}, and the hub has no such model within reach: {}"


@files_at_hand()
def check_source_name(name: str) -> None:
    """Raises UserError if a source is a .gguf file that is missing, or neither a folder nor a hub id.

    A hub id is refused if the model is not in the hub's cache and the hub cannot be reached. A path is refused if it
    must not be looked at.
    """
    check_path(path := Path(name))
    if is_gguf(path):
        if not path.is_file():
            raise UserError(f"There is no file {path}.")
    elif path.exists():
        if not path.is_dir():
            within = f" Give its folder, {path.parent}." if (path.parent / "config.json").is_file() else ""
            raise UserError(f"{path} is neither a model folder nor a .gguf file.{within}")
    elif not HUB_ID.fullmatch(name):
        address = HUB_ADDRESS.match(name)
        raise UserError(NO_ID.format(name) + (f" Give the id alone: {address[1]}." if address else ""))
    else:
        _check_hub(name)


def _check_hub(name: str) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        snapshot_download(name, local_files_only=True, allow_patterns="config.json")
    except HFValidationError:
        raise UserError(NO_ID.format(name)) from None
    except LocalEntryNotFoundError:
        if reason := no_hub():
            raise UserError(NOT_WITHIN_REACH.format(name, reason)) from None


@files_at_hand()
def check_exists(*paths: Path) -> None:
    """Raises UserError if there is no file or folder at one of the paths, or it must not be looked at."""
    for path in paths:
        check_path(path)
        if not path.exists():
            raise UserError(f"There is no file or folder {path}.")
