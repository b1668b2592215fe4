"""How results show themselves in an interactive session: in one or a few lines, whatever they hold."""

from __future__ import annotations

import dataclasses
from typing import Any

LONGEST = 120
"""The most characters of a value; longer ones are named by their number of entries or their type."""


class Shown:
    """A base of dataclasses with `repr=False`, whose repr has all fields in short."""

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # of a dataclass
        return f"{type(self).__name__}({', '.join(f'{one.name}={short(getattr(self, one.name))}' for one in fields)})"


class ShownDict(dict[str, Any]):
    """A dict whose repr has all values in short."""

    def __repr__(self) -> str:
        return "{" + ", ".join(f"{key!r}: {short(value)}" for key, value in self.items()) + "}"


def short(value: object) -> str:
    """Returns the repr of a value, or if that is long: `<272 entries>`, or its type."""
    if isinstance(value, (list, tuple, dict)) and len(value) > LONGEST:
        return f"<{len(value)} entries>"
    text = repr(value)
    if len(text) <= LONGEST:
        return text
    return f"<{len(value)} entries>" if isinstance(value, (list, tuple, dict)) else f"<{type(value).__name__}>"
