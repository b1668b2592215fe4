"""The options of `lqexport quantize`, made from the fields of `Recipe`, which declare each of them once."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from lqexport.errors import UserError
from lqexport.recipe import Recipe, load_recipe, plain_type

GIVEN_BY_ARGUMENT = ("source",)
"""Fields of a recipe that are no options."""

VALUE_TYPES: dict[str, Any] = {"str": str, "int": int, "float": float, "bool": bool, "list[str]": list[str]}

RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="TOML file of these options; those given here count before it.")
]


def with_recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command an option for each field of `Recipe`.

    The command has a parameter `options`: it gets field name to value, None for each option that was not given. The
    common options come first, then the command's own, then the options that have a panel.
    """
    fields = [option for option in dataclasses.fields(Recipe) if option.name not in GIVEN_BY_ARGUMENT]
    hints = get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(command).parameters.items()
        if name != "options"
    ]
    arguments = [parameter for parameter in own if parameter.default is inspect.Parameter.empty]
    common = [_parameter(option) for option in fields if option.metadata["panel"] is None]
    others = [_parameter(option) for option in fields if option.metadata["panel"] is not None]
    own_options = [parameter for parameter in own if parameter not in arguments]

    @functools.wraps(command)
    def wrapper(**given: Any) -> None:
        options = {option.name: given.pop(option.name) for option in fields}
        command(options=options, **given)

    parameters = [*arguments, *common, *own_options, *others]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper


def _parameter(option: dataclasses.Field[Any]) -> inspect.Parameter:
    """Returns the parameter that typer reads for a field; its value is None if the option is not given."""
    about = option.metadata
    has_default = option.default not in (None, "", dataclasses.MISSING)
    text = f"{about['help']} [default: {option.default}]" if has_default else about["help"]
    flags = [about["flags"]] if about["flags"] else []
    optional: Any = VALUE_TYPES[plain_type(option)] | None
    annotation: Any = Annotated[optional, typer.Option(*flags, help=text, rich_help_panel=about["panel"])]
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def merged_recipe(file: Path | None, options: dict[str, Any]) -> Recipe:
    """Returns the recipe of a TOML file with the options of the command line (if not None) in place of the file's.

    Raises UserError as `load_recipe` and `Recipe` do.
    """
    given = {name: value for name, value in options.items() if value not in (None, [])}
    merged = (load_recipe(file) if file else {}) | given
    if "source" not in merged:
        raise UserError("No source: give a model folder, a hub id or a .gguf file.")
    return Recipe(**merged)
