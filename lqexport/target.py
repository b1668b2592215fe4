"""The target of a run: the format that a model is quantized into, parsed once from a text such as `gguf:Q4_K_M`."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A format family and what is asked for within it.

    family   `gguf`, `native`, `gptq` or `exl2`; planning refuses any other
    type     a type (`Q4_K`, `table-3`, `4-g128-act`), a mix of llama.cpp (`Q4_K_M`) or `auto`; empty for `exl2`
    """

    family: str
    type: str = ""

    @classmethod
    def parse(cls, text: str) -> Target:
        """The target that a text names. Any text is one: planning refuses what no format has."""
        family, _, type_name = text.partition(":")
        return cls(family, type_name)

    def __str__(self) -> str:
        return f"{self.family}:{self.type}" if self.type else self.family

    @property
    def is_auto(self) -> bool:
        """Whether the type of every tensor is chosen to fit a size."""
        return self == AUTO

    @property
    def stores_columns_in_solve_order(self) -> bool:
        """Whether the file stores a linear's columns in act-order, the order in which they are solved."""
        return self.family == "exl2" or self.type.endswith("-act")

    @property
    def has_fixed_types(self) -> bool:
        """Whether the target decides the type of every tensor, so that none can be set by hand."""
        return self.family in ("exl2", "gptq")

    @property
    def rows_share_numbers(self) -> bool:
        """Whether rows of a linear share stored numbers, so that all rows need the same second moments."""
        return self.family in ("exl2", "gptq")

    @property
    def gguf_bits(self) -> int | None:
        """Bits of a GGUF type or mix by its name, such as 4 of `Q4_K_M` and `IQ4_XS`; None for other targets."""
        bits = re.match(r"I?Q(\d)", self.type) if self.family == "gguf" else None
        return int(bits[1]) if bits else None


AUTO = Target("gguf", "auto")


def full_name(type_name: str) -> str:
    """The name of a type with its family: `Q6_K` is short for `gguf:Q6_K`, as users write it."""
    return type_name if ":" in type_name else f"gguf:{type_name}"
