"""The options of `lqexport quantize`, made from the fields of `Recipe`, which declare each of them once."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

from lqexport.cli.shared_options import MACHINE
from lqexport.errors import UserError
from lqexport.recipe import CALIBRATION, CORRECTION, SOLVER, TUNING, TYPES, Recipe, load_recipe, plain_type

GIVEN_BY_ARGUMENT = ("source",)
"""Fields of a recipe that are no options."""

VALUE_TYPES: dict[str, Any] = {"str": str, "int": int, "float": float, "bool": bool, "list[str]": list[str]}

RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="TOML file of these options. Options on the command line override it.")
]

RARE = (CALIBRATION, SOLVER, TYPES, TUNING, CORRECTION, MACHINE)
"""Panels that `--help-all` shows and `--help` does not."""
HELP_ALL = "help_all"


class ShortHelp(TyperCommand):
    """A command whose `--help` leaves out the panels of `RARE`."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Prints the help; with everything if `--help-all` asked for it."""
        rare = [] if ctx.meta.get(HELP_ALL) else [
            option for option in self.params if getattr(option, "rich_help_panel", None) in RARE
        ]  # fmt: skip
        for option in rare:
            option.hidden = True  # type: ignore[attr-defined]  # arguments have no panel here
        try:
            super().format_help(ctx, formatter)
        finally:
            for option in rare:
                option.hidden = False  # type: ignore[attr-defined]


def _show_everything(context: typer.Context, wanted: bool) -> None:
    if wanted:
        context.meta[HELP_ALL] = True
        typer.echo(context.get_help())
        raise typer.Exit


def with_recipe_options(
    *, without: tuple[str, ...] = (), **notes: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Returns a decorator that gives a command an option for each field of `Recipe`, and `--help-all`.

    without   fields that the command has no option for
    notes     field name -> what the command adds to the option's help

    The command has a parameter `options`: it gets field name to value, None for each option that was not given. A
    parameter that is a dataclass of options, such as `MeasurementOptions`, stands for an option for each of its fields.
    The common options come first, then the command's own, then the options that have a panel.
    """
    return functools.partial(_with_recipe_options, left_out=(*GIVEN_BY_ARGUMENT, *without), notes=notes)


def _with_recipe_options(
    command: Callable[..., None], left_out: tuple[str, ...], notes: dict[str, str]
) -> Callable[..., None]:
    fields = [option for option in dataclasses.fields(Recipe) if option.name not in left_out]
    declared = _declared(command)
    groups: dict[str, Any] = {
        name: hint for name, hint in get_type_hints(command).items() if dataclasses.is_dataclass(hint)
    }
    arguments = [parameter for parameter in declared if parameter.default is inspect.Parameter.empty]
    common = [_parameter(option, notes) for option in fields if option.metadata["panel"] is None]
    others = [_parameter(option, notes) for option in fields if option.metadata["panel"] is not None]
    own_options = [parameter for parameter in declared if parameter not in arguments]
    own_common = [parameter for parameter in own_options if _panel(parameter) is None]
    own_others = [parameter for parameter in own_options if _panel(parameter) is not None]

    @functools.wraps(command)
    def wrapper(**given: Any) -> None:
        options = {option.name: given.pop(option.name) for option in fields}
        given.pop(HELP_ALL)
        for name, group in groups.items():
            given[name] = group(**{option.name: given.pop(option.name) for option in dataclasses.fields(group)})
        command(options=options, **given)

    parameters = [*arguments, *common, *own_common, _help_all(), *own_others, *others]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper


def _declared(declaration: Any) -> list[inspect.Parameter]:
    """Returns the arguments and options that a command or a dataclass of options declares, without recipe options."""
    hints, declared = get_type_hints(declaration, include_extras=True), list[inspect.Parameter]()
    for name, parameter in inspect.signature(declaration).parameters.items():
        if dataclasses.is_dataclass(hints[name]):
            declared += _declared(hints[name])
        elif name != "options":
            declared.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))
    return declared


def _panel(parameter: inspect.Parameter) -> str | None:
    """Returns the panel of an option of a command's own."""
    (option,) = parameter.annotation.__metadata__
    return option.rich_help_panel


def _help_all() -> inspect.Parameter:
    text = "Show these options and all others: calibration, solver, types, tuning, low-rank correction, machine."
    annotation: Any = Annotated[bool, typer.Option("--help-all", is_eager=True, callback=_show_everything, help=text)]
    return inspect.Parameter(HELP_ALL, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)


def _parameter(option: dataclasses.Field[Any], notes: dict[str, str]) -> inspect.Parameter:
    """Returns the parameter that typer reads for a field; its value is None if the option is not given."""
    about = option.metadata
    has_default = option.default not in (None, "", dataclasses.MISSING)
    text = f"{about['help']} [default: {option.default}]" if has_default else about["help"]
    text += f" {notes[option.name]}" if option.name in notes else ""
    flags = [about["flags"]] if about["flags"] else []
    optional: Any = VALUE_TYPES[plain_type(option)] | None
    annotation: Any = Annotated[optional, typer.Option(*flags, help=text, rich_help_panel=about["panel"])]
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def merged_recipe(
    file: Path | None, options: dict[str, Any], target_of: Callable[[dict[str, Any]], str] | None = None
) -> Recipe:
    """Returns the recipe of a TOML file with the options of the command line (if not None) in place of the file's.

    target_of   returns the target for all other options, if none of them is a target

    Raises UserError as `load_recipe`, `target_of` and `Recipe` do.
    """
    given = {name: value for name, value in options.items() if value not in (None, [])}
    merged = (load_recipe(file) if file else {}) | given
    if target_of and not merged.get("target"):
        merged["target"] = target_of(merged)
    if "source" not in merged:
        raise UserError("No source: give a model folder, a hub id or a .gguf file.")
    return Recipe(**merged)
