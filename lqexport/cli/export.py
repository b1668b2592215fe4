"""The command export: the whole way from a model to a verified file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lqexport.cli.common import output, plain_endings, print_json
from lqexport.cli.options import RecipeFile, merged_recipe, with_recipe_options
from lqexport.cli.quantize import Run, is_another_process, print_plan
from lqexport.cli.shared_options import (
    Cache,
    Device,
    DeviceMemory,
    DryRun,
    HostMemory,
    Json,
    MeasurementOptions,
    MinCosine,
    SourceModel,
    Verbose,
)
from lqexport.models.model_path import check_source_name
from lqexport.runtime.progress import terminal_listener

if TYPE_CHECKING:
    from lqexport.delivery.deliver import Delivery
    from lqexport.delivery.request import Request
    from lqexport.planning.dryrun import Preview

STOPPED = "Stopped. Run the same command again to go on; nothing has its final name yet."


@with_recipe_options(target="[default: gguf: and the type in FILE's name; gguf:auto with --size, exl2 with --bits]")
def export(
    source: SourceModel,
    file: Annotated[
        Path, typer.Argument(help="The file to write, such as model-Q4_K_M.gguf; a folder for other targets than GGUF.")
    ],
    options: dict[str, Any],
    *,
    recipe_file: RecipeFile = None,
    measured: MeasurementOptions,
    min_cosine: MinCosine = None,
    keep_artifact: Annotated[
        bool, typer.Option("--keep-artifact", help="Keep FILE.work/artifact once the file is verified.")
    ] = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
    as_json: Json = False,
    device: Device = "auto",
    device_memory: DeviceMemory = None,
    host_memory: HostMemory = None,
    cache: Cache = None,
) -> None:
    """Quantize SOURCE, write it as FILE, and verify FILE.

    FILE gets its name once it has passed; FILE.record then has its model card, report and verification.json. If the
    file exceeds a limit, it is named like model-Q4_K_M.failed.gguf, and the exit status is 1. A stopped export goes on
    when the same command is given again; until then, FILE.work has what is finished.

    Examples:

        lqexport export ./model model-Q4_K_M.gguf
        lqexport export ./model model-Q4_K_M.gguf --dry-run
        lqexport export ./model model.gguf --size 4.25bpw
        lqexport export ./model ./model-exl2 --bits 3.5 --text wikitext2:test
    """
    with plain_endings(STOPPED):
        check_source_name(source)
        from lqexport.delivery.places import Places, target_of

        recipe = merged_recipe(
            recipe_file, options | {"source": source},
            lambda given: target_of(file, size=given.get("size"), bits=given.get("bits")),
        )  # fmt: skip
        places = Places(file)
        if not is_another_process():
            places.check(recipe.parsed_target)  # before what takes seconds to import
        run = Run(recipe, places.artifact, device, cache, device_memory, host_memory)
        if is_another_process():
            if not dry_run:
                run.quantize()
            return
        from lqexport.delivery.request import Request

        measurement = measured.measurement(min_cosine)
        request = Request(recipe, places, measurement, device, cache, run.limits, keep_artifact)
        if dry_run:
            _preview(request, run, verbose=verbose, as_json=as_json)
            return
        delivery = _deliver(request, verbose=verbose, as_json=as_json)
    if not delivery.passed:
        raise typer.Exit(1)


def _preview(request: Request, run: Run, *, verbose: bool, as_json: bool) -> None:
    """Prints the plan and the estimates of an export, after all its checks."""
    from lqexport.converters.models.architectures import architecture_of
    from lqexport.planning.dryrun import as_json as preview_json
    from lqexport.verification.text_share import most_windows

    shown = request.check()
    request.check_room(shown)
    placement = run.placement(shown)
    if as_json:
        print_json(preview_json(shown, placement))
        return
    print_plan(shown, placement, verbose=verbose, estimates=True)
    print(f"While {request.places.model} is not verified, its artifact takes as much again on the disk.")
    pieces = "sentences" if architecture_of(shown.config).encoder else "windows"
    most = most_windows(request.measurement.windows, shown.config)
    extent = f"{most} {pieces}" if most else "the whole"
    print(f"Verified in {request.engine}, on {extent} of {request.measurement.text}")


def _deliver(request: Request, *, verbose: bool, as_json: bool) -> Delivery:
    """Runs the export, and prints its plan before and its summary after."""
    from lqexport.delivery.deliver import deliver
    from lqexport.delivery.summary import next_steps, summary
    from lqexport.planning.dryrun import show_plan

    def show(plan: Preview) -> None:
        if not as_json:
            show_plan(plan, output(), verbose)

    with terminal_listener() as listener:
        delivery = deliver(request, listener, show)
    if as_json:
        print_json(delivery.as_json())
    else:
        output().print(summary(delivery))
        print("\n".join(next_steps(delivery)))
    return delivery
