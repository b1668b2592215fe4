"""Every codec by name. Adding a format is one file in this folder and one line here."""

from __future__ import annotations

from lqexport.formats.codec import Codec


def codec(name: str) -> Codec:
    """The codec called `name`. Raises ValueError for an unknown name."""
    raise ValueError(f"unknown format {name!r}")
