"""Every codec by name. Adding a format is one file in this folder and one line here.

A format of EXL2 lists the groups of one matrix, so there are too many to list: `codec_named` makes them from their names.
Those of GPTQ are of a whole model, never of one tensor, so `names` leaves them out too (see `formats.gptq.GPTQ`).
"""

from __future__ import annotations

import difflib

from lqexport.formats.codec import GridCodec, PlainCodec, SectionedCodec
from lqexport.formats.exl2 import Exl2, runs_named
from lqexport.formats.gguf import GGUF
from lqexport.formats.gptq import GPTQ
from lqexport.formats.mxint import MXINT
from lqexport.formats.native import NATIVE
from lqexport.formats.plain import PLAIN

_ALL: tuple[PlainCodec | GridCodec, ...] = (*PLAIN, *GGUF, *NATIVE, *MXINT)
_CODECS = {codec.name: codec for codec in _ALL}


def codec_named(name: str) -> PlainCodec | GridCodec | SectionedCodec:
    """The codec called `name`. Raises ValueError for an unknown name, listing those that are near."""
    if name in _CODECS:
        return _CODECS[name]
    if name.startswith("exl2:"):
        return Exl2(runs_named(name))
    if name in GPTQ:
        return GPTQ[name]
    # Users forget the family and the case: compare what comes after the colon, in one case.
    known = {full.lower(): full for full in _CODECS} | {full.split(":")[1].lower(): full for full in _CODECS}
    near = dict.fromkeys(known[match] for match in difflib.get_close_matches(name.lower(), known, n=5, cutoff=0.7))
    hint = f"Near: {', '.join(near)}." if near else f"Known: {', '.join(_CODECS)}."
    raise ValueError(f"Unknown format {name!r}. {hint}")


def names(family: str | None = None) -> list[str]:
    """Names of all listed codecs, or of one family (`gguf`, `native`), in the order of their files."""
    return [name for name in _CODECS if family is None or name.startswith(f"{family}:")]
