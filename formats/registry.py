"""Every codec by name. To add a format, write a file in this folder and add a line here.

`names` leaves out three families. The name of an EXL2 codec lists the groups of one matrix, so there are too many
names; `codec_named` makes the codec from its name. GPTQ's codecs (`formats.gptq.GPTQ`) are chosen for a whole model,
never for one tensor. EXL3's (`formats.exl3.EXL3`) have no grid.
"""

from __future__ import annotations

from lqexport.formats.codec import GridCodec, PlainCodec, SectionedCodec, TrellisCodec
from lqexport.formats.exl2 import Exl2, runs_named
from lqexport.formats.exl3 import EXL3
from lqexport.formats.gguf import GGUF, GGUF_SCALED
from lqexport.formats.gguf_ternary import GGUF_TERNARY
from lqexport.formats.gguf_vectors import GGUF_VECTORS
from lqexport.formats.gptq import GPTQ
from lqexport.formats.mlx import MLX
from lqexport.formats.mlx_floats import MLX_FLOATS
from lqexport.formats.mxint import MXINT
from lqexport.formats.native import NATIVE
from lqexport.formats.plain import PLAIN
from lqexport.target import unknown

_ALL: tuple[PlainCodec | GridCodec, ...] = (
    *PLAIN, *GGUF, *GGUF_SCALED, *GGUF_TERNARY, *GGUF_VECTORS, *NATIVE, *MXINT, *MLX, *MLX_FLOATS,
)  # fmt: skip
_CODECS = {codec.name: codec for codec in _ALL}


def codec_named(name: str) -> PlainCodec | GridCodec | SectionedCodec | TrellisCodec:
    """Returns the codec called `name`, which packs and unpacks.

    Raises ValueError for an unknown name, whose message lists similar names.
    """
    if name in _CODECS:
        return _CODECS[name]
    if name.startswith("exl2:"):
        return Exl2(runs_named(name))
    if name in GPTQ:
        return GPTQ[name]
    if name in EXL3:
        return EXL3[name]
    raise ValueError(unknown("format", name, _CODECS))


def family_of(name: str) -> str:
    """Returns the family of the codec called `name`: `gguf` for `gguf:Q4_K`."""
    return name.partition(":")[0]


def names(family: str | None = None) -> list[str]:
    """Returns the names of all codecs, or of one family (`gguf`, `native`), in the order of their files."""
    return [name for name in _CODECS if family is None or family_of(name) == family]
