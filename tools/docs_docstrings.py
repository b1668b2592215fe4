"""mkdocstrings calls this: our docstrings as Markdown. A line `name   what it is`, and those indented below it, become
an item of a list."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ITEM = re.compile(r"(?P<names>\w+(?:, \w+)*) {2,}(?P<text>\S.*)")


class Docstrings(Extension):
    """Rewrites every docstring before it is shown."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(docstring: str) -> str:
    """A docstring with its aligned lists as lists of Markdown.

    >>> print(markdown("Say it.\\n\\nto    whom\\nwhat  a sentence,\\n      or two"))
    Say it.
    <BLANKLINE>
    - `to`: whom
    - `what`: a sentence,
          or two
    """
    return "\n".join(ITEM.sub(r"- `\g<names>`: \g<text>", line) for line in docstring.split("\n"))
