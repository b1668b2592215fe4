"""The target of a run: the format that a model is quantized into, parsed once from a text such as `gguf:Q4_K_M`.

Names of targets and types are accepted as llama.cpp's users type them (`q4_k_m`, `Q4KM`), and stored in one spelling
(`spelled`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

GGUF_NAME = re.compile(
    r"(?:(I?Q\d)[_-]?(K|NL|XS|0|1)(?:[_-]?([SML]))?|(IQ[123])[_-]?(XXS|S|M)|(TQ\d)[_-]?(0))(?:[_-]?(MIX))?"
    r"|(MXFP4)(?:[_-]?(MOE))?|NVFP4|B?F16|F32|AUTO",
    re.IGNORECASE,
)
"""GGUF's types and mixes as users type them: in any case, with or without the underscores."""
NOT_KNOWN = {"Q2_0": "TQ2_0 and Q2_K"}
"""Type of llama.cpp that the installed gguf package does not know -> the nearest types that are written."""
FAMILIES = ("gguf", "native", "mlx", "gptq", "exl2", "exl3")
EXAMPLES = ("gguf:Q4_K_M", "native:table-3", "gptq:4-g128", "gguf:Q6_K")


@dataclass(frozen=True)
class Target:
    """A format family and what is asked for within it.

    family   `gguf`, `native`, `mlx`, `gptq`, `exl2` or `exl3`; planning refuses any other
    type     a type (`Q4_K`, `table-3`, `4-g128-act`, `2.5`), a mix of llama.cpp (`Q4_K_M`) or `auto`; empty for `exl2`,
             and for `exl3` with bits per weight
    """

    family: str
    type: str = ""

    @classmethod
    def parse(cls, text: str) -> Target:
        """Returns the target that a text names: `gguf:Q4_K_M`, or `q4_k_m` for short.

        Any text is one: planning refuses what no format has.
        """
        name = spelled(text)
        family, _, type_name = (full_name(name) if GGUF_NAME.fullmatch(name) else name).partition(":")
        return cls(family, type_name)

    def __str__(self) -> str:
        return f"{self.family}:{self.type}" if self.type else self.family

    @property
    def is_auto(self) -> bool:
        """Whether the type of every tensor is chosen to fit a size."""
        return self.type == AUTO.type and self.family in ("gguf", "mlx")

    @property
    def stores_columns_in_solve_order(self) -> bool:
        """Whether the file stores a linear's columns in act-order, the order in which they are solved."""
        return self.family == "exl2" or self.type.endswith("-act")

    @property
    def has_fixed_types(self) -> bool:
        """Whether the target decides the type of every tensor, so that none can be set by hand."""
        return self.family in ("exl2", "exl3", "gptq")

    @property
    def rows_share_numbers(self) -> bool:
        """Whether rows of a linear share stored numbers, so that all rows need the same second moments."""
        return self.family in ("exl2", "exl3", "gptq")

    @property
    def bits(self) -> int | None:
        """Bits in the name of a GGUF, MLX or EXL3 type or mix, rounded down: 4 of `Q4_K_M` and `4-g64`. Else None."""
        named = {"mlx": r"(\d)-|(?:mx|nv)fp(\d)$", "exl3": r"(\d)(?:\.5)?$"}.get(self.family)
        bits = re.match(named, self.type) if named else None
        return int(bits[bits.lastindex or 0]) if bits else self.gguf_bits

    @property
    def takes_bits(self) -> bool:
        """Whether the linears take a number of bits per weight on average, which each linear gets its share of."""
        return self.family in ("exl2", "exl3") and not self.type

    @property
    def quantizes_embedding(self) -> bool:
        """Whether the embedding is stored in as few bits as the linears, so that blocks are solved on its output."""
        return self.family == "mlx"

    @property
    def gguf_bits(self) -> int | None:
        """Bits of a GGUF type or mix by its name, such as 4 of `Q4_K_M` and `NVFP4`; None for other targets."""
        bits = re.match(r"(?:[IT]?Q|(?:MX|NV)FP)(\d)", self.type) if self.family == "gguf" else None
        return int(bits[1]) if bits else None


AUTO = Target("gguf", "auto")


def full_name(type_name: str) -> str:
    """Returns the name of a type with its family: `Q6_K` or `q6_k` is short for `gguf:Q6_K`."""
    name = spelled(type_name)
    return name if ":" in name else f"gguf:{name}"


def spelled(name: str) -> str:
    """Returns the one spelling of a target or type: `gguf:Q4_K_M` for `GGUF:q4km`, `Q4_K_M` for `q4_k_m`.

    A name without a family stays without one. What looks like no name, such as a size, stays as it is.
    """
    family, colon, type_name = name.strip().rpartition(":")
    if family.lower() in ("", "gguf") and (match := GGUF_NAME.fullmatch(type_name)):
        parts = [part for part in match.groups() if part] or [type_name]
        gguf_name = "_".join(parts).upper()
        return f"{family.lower()}{colon}{'auto' if gguf_name == 'AUTO' else gguf_name}"
    if (family or type_name).lower() in FAMILIES:
        return f"{family.lower()}{colon}{type_name if family.lower() == 'gguf' else type_name.lower()}"
    return name


def type_at_end(stem: str) -> str | None:
    """Returns the type or mix at the end of the stem of a GGUF file's name, in its one spelling; None if there is none.

    `Q4_K_M` for `model-Q4_K_M`, `IQ4_XS` for `Model.iq4_xs`.
    """
    match = re.search(rf"(?:^|[-._])({GGUF_NAME.pattern})$", stem, re.IGNORECASE)
    name = spelled(match[1]) if match else None
    return None if name == AUTO.type else name


def unknown(noun: str, name: str, known: Iterable[str], use: str = "") -> str:
    """Returns the message about a name that cannot be chosen.

    noun   what the name should be, such as `target`
    use    what it is asked for, such as ` for the embedding`; empty if that is clear
    """
    if (short := name.removeprefix("gguf:")) in NOT_KNOWN:
        return (
            f"{short}{use} cannot be chosen: the gguf package does not know it yet. The nearest that can be written: "
            f"{NOT_KNOWN[short]}."
        )
    return f"Unknown {noun} {name!r}{use}. {did_you_mean(name, known)}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns the end of a message about an unknown name: at most three known ones like it, else some examples.

    Users forget the family and the case, so names are compared without both, too.
    """
    by_spelling = {full.partition(":")[2].lower(): full for full in known} | {full.lower(): full for full in known}
    near = [by_spelling[match] for match in difflib.get_close_matches(name.lower(), by_spelling, n=6, cutoff=0.6)]
    if not near:
        return f"Known are such as {', '.join([full for full in EXAMPLES if full in by_spelling.values()][:3])}."
    *others, last = list(dict.fromkeys(near))[:3]
    return f"Did you mean {', '.join(others) + ' or ' if others else ''}{last}?"


def implied_target(size: str | None, bits: float | None) -> str:
    """Returns the target that a size or a number of bits alone stands for: gguf:auto or exl2; else no name."""
    if size is not None:
        return str(AUTO)
    return "exl2" if bits is not None else ""
