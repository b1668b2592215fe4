"""A mkdocstrings extension that turns our docstrings into Markdown.

A line `name   what it is`, with the lines indented below it, becomes a list item.
"""

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
    """Returns a docstring with its aligned lists as Markdown lists.

    >>> print(markdown("Say it.\\n\\nto    whom\\nwhat  a sentence,\\n      or two"))
    Say it.
    <BLANKLINE>
    - `to`: whom
    - `what`: a sentence,
          or two
    """
    return "\n".join(ITEM.sub(r"- `\g<names>`: \g<text>", line) for line in docstring.split("\n"))
