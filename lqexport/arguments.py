"""Checks the values that a script gives, as arguments and as options of a recipe, by their annotations.

A wrong value would otherwise end in a traceback somewhere within the work, or in a wrong result.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

from lqexport.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")

LIST = re.compile(r"(?:list|tuple|Sequence|Iterable)\[([^,\]]+)(?:, \.\.\.)?\]")
"""Matches the annotation of several values; the group is that of each."""
OR = re.compile(r" \| (?![^\[]*\])")
"""Matches what stands between two alternatives of an annotation."""


class Form(NamedTuple):
    """The values that an annotation allows.

    noun      what the value must be, for messages
    types     types of right values
    near      a type whose values are taken, too
    convert   makes a right value of one of those
    """

    noun: str
    types: tuple[type, ...]
    near: type | tuple[()] = ()
    convert: Callable[[Any], Any] = str


FORMS = {
    "None": Form("None", (type(None),)),
    "bool": Form("True or False", (bool,)),
    "int": Form("a whole number", (int,), Integral, int),
    "float": Form("a number", (int, float), Real, float),
    "str": Form("text", (str,), Path, str),
    "Path": Form("a path", (Path,), str, Path),
}
"""Annotation -> its form. Numbers of NumPy become Python's, which JSON can hold."""
OBJECTS = {
    "Recipe": "an lqexport.Recipe",
    "MemoryLimits": "an lqexport.MemoryLimits",
    "Listener": "an lqexport.Listener, such as lqexport.Callback makes of a function",
}
"""Annotation of an object of lqexport's -> what messages call it."""


def taken(name: str, value: Any, annotation: str) -> Any:
    """Returns the value of an argument or option in a type that its annotation names.

    name         what the user calls it
    annotation   the source text of the type, such as `int | None`; with a type that is neither in FORMS nor in OBJECTS,
                 any value is returned as it is

    A path is taken for text and text for a path, and a tuple for a list. Raises UserError for any other type.
    """
    alternatives = OR.split(annotation)
    if not all(entry in FORMS or entry in OBJECTS or LIST.fullmatch(entry) for entry in alternatives):
        return value
    if any(_is(value, entry) for entry in alternatives):
        return value
    for entry in alternatives:
        if (several := LIST.fullmatch(entry)) and isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
            items = [taken(f"each of {name}", item, several[1]) for item in value]
            return tuple(items) if entry.startswith("tuple") else items
        if entry in FORMS and isinstance(value, FORMS[entry].near) and not isinstance(value, bool):
            return FORMS[entry].convert(value)
    nouns = [_noun(entry, value) for entry in alternatives if entry != "None"]
    raise UserError(f"{name} must be {' or '.join(dict.fromkeys(nouns))}, not {value!r}.")


def _is(value: Any, annotation: str) -> bool:
    """Returns whether a value has the very type that an annotation without alternatives names."""
    if form := FORMS.get(annotation):
        return isinstance(value, form.types) and (annotation == "bool" or not isinstance(value, bool))
    if annotation == "Listener":  # a protocol, which any class can have
        return all(callable(getattr(value, method, None)) for method in ("stage", "advance", "message"))
    return any(base.__name__ == annotation for base in type(value).__mro__)


def _noun(annotation: str, value: Any) -> str:
    """Returns what a value must be by an annotation without alternatives."""
    if annotation in FORMS:
        return FORMS[annotation].noun
    return OBJECTS.get(annotation) or f"a list, such as [{value!r}]"


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Returns the function with a check of its arguments by `taken`, whose UserError names the argument."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def with_check(*args: P.args, **kwargs: P.kwargs) -> T:
        given = signature.bind(*args, **kwargs)
        for name, value in given.arguments.items():
            given.arguments[name] = taken(name, value, str(signature.parameters[name].annotation))
        return function(*given.args, **given.kwargs)

    return with_check
