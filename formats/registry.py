"""Every codec by name. Adding a format is one file in this folder and one line here."""

from __future__ import annotations

import difflib

from lqexport.formats.codec import GridCodec, PlainCodec
from lqexport.formats.gguf import GGUF
from lqexport.formats.mxint import MXINT
from lqexport.formats.native import NATIVE
from lqexport.formats.plain import PLAIN

_ALL: tuple[PlainCodec | GridCodec, ...] = (*PLAIN, *GGUF, *NATIVE, *MXINT)
_CODECS = {codec.name: codec for codec in _ALL}


def codec(name: str) -> PlainCodec | GridCodec:
    """The codec called `name`. Raises ValueError for an unknown name, listing those that are near."""
    if name in _CODECS:
        return _CODECS[name]
    # Users forget the family and the case: compare what comes after the colon, in one case.
    known = {full.lower(): full for full in _CODECS} | {full.split(":")[1].lower(): full for full in _CODECS}
    near = dict.fromkeys(known[match] for match in difflib.get_close_matches(name.lower(), known, n=5, cutoff=0.7))
    hint = f"Near: {', '.join(near)}." if near else f"Known: {', '.join(_CODECS)}."
    raise ValueError(f"Unknown format {name!r}. {hint}")


def names(family: str | None = None) -> list[str]:
    """Names of all codecs, or of one family (`gguf`, `native`), in the order of their files."""
    return [name for name in _CODECS if family is None or name.startswith(f"{family}:")]
