"""The command ladder: all files of a model that a publisher offers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lqexport.cli.common import output, plain_endings, print_json
from lqexport.cli.options import RecipeFile, merged_recipe, with_recipe_options
from lqexport.cli.quantize import memory_limits
from lqexport.cli.shared_options import (
    Device,
    DeviceMemory,
    DryRun,
    HostMemory,
    Json,
    MeasurementOptions,
    SourceModel,
)
from lqexport.models.model_path import check_source_name
from lqexport.runtime.progress import terminal_listener

if TYPE_CHECKING:
    from lqexport.delivery.ladder import Ladder, Rung
    from lqexport.planning.memory import MemoryLimits

STOPPED = "Stopped. Run the same command again to go on; finished files stay."


@with_recipe_options(without=("target", "size", "bits"))
def ladder(
    source: SourceModel,
    folder: Annotated[
        Path, typer.Argument(help="Folder of the files: new, or of the same ladder, which then goes on.")
    ],
    options: dict[str, Any],
    *,
    targets: Annotated[
        str | None,
        typer.Option(
            help="The GGUF types or mixes to make, separated by commas.",
            show_default="Q2_K_M,Q3_K_M,Q4_K_M,Q5_K_M,Q6_K,Q8_0, or none with --sizes",
        ),
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(
            help="Make a file for each of these sizes, of the types that lose least; separated by commas, such as "
            "2.5bpw,3.9GB,Q4_K_M."
        ),
    ] = None,
    recipe_file: RecipeFile = None,
    measured: MeasurementOptions,
    dry_run: DryRun = False,
    as_json: Json = False,
    device: Device = "auto",
    device_memory: DeviceMemory = None,
    host_memory: HostMemory = None,
) -> None:
    """Quantize SOURCE into several GGUF files in FOLDER, verify each, and compare them.

    FOLDER gets the files, each with the record of its verification, and a README.md for the hub with a table and a plot
    of what each file loses. A stopped ladder goes on when the same command is given again. If a file exceeds a limit,
    it is named like model-Q2_K_M.failed.gguf, the others are still made, and the exit status is 1.

    Examples:

        lqexport ladder ./model ./files
        lqexport ladder ./model ./files --targets Q3_K_M,IQ4_XS,Q6_K --dry-run
        lqexport ladder ./model ./files --sizes 2.5bpw,3.5bpw,Q4_K_M
        lqexport push-to-hub ./files YOU/model-GGUF
    """
    with plain_endings(STOPPED):
        check_source_name(source)
        from lqexport.delivery.ladder import TYPES, finished_ladder, planned_ladder

        named, of_sizes = _listed(targets), _listed(sizes)
        # Of all recipes, this one is checked first; each file then has its own target and size.
        first = {"target": "gguf:auto", "size": of_sizes[0]} if of_sizes else {"target": f"gguf:{(named or TYPES)[0]}"}
        recipe = merged_recipe(recipe_file, options | {"source": source} | first)
        limits = memory_limits(device, device_memory, host_memory)
        rungs = planned_ladder(recipe, folder, named, of_sizes, measured.measurement(), device=device, memory=limits)
        if dry_run:
            _preview(rungs, device, limits, as_json=as_json)
            return
        with terminal_listener() as listener:
            made = finished_ladder(rungs, folder, listener)
        _show(made, as_json=as_json)
    if not made.passed:
        raise typer.Exit(1)


def _listed(names: str | None) -> list[str] | None:
    """Returns what an option names, separated by commas; None if it was not given."""
    return None if names is None else [name.strip() for name in names.split(",") if name.strip()]


def _preview(rungs: list[Rung], device: str, limits: MemoryLimits, *, as_json: bool) -> None:
    """Prints size, time and memory of every file that is not there yet."""
    from lqexport.delivery.ladder_plan import planned_files, table

    files = planned_files(rungs, device, limits)
    if as_json:
        print_json(files)
    else:
        output().print(table(files))


def _show(made: Ladder, *, as_json: bool) -> None:
    """Prints the comparison and what comes next."""
    from lqexport.delivery.ladder_card import table

    if as_json:
        print_json(made.as_json())
        return
    output().print(table(made.steps))
    for path in made.failed:
        print(f"failed: {path}; its record says why.")
    if made.steps:
        print(f"Card:    {made.folder / 'README.md'}")
    if made.passed:
        print(f"Publish: lqexport push-to-hub {made.folder} YOU/NAME")
