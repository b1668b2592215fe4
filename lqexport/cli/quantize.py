"""The commands quantize and plan."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lqexport.cli.common import output, plain_endings, print_json
from lqexport.cli.options import RecipeFile, merged_recipe, with_recipe_options
from lqexport.cli.shared_options import Cache, Device, DeviceMemory, DryRun, HostMemory, Json, SourceModel, Verbose
from lqexport.models.model_path import check_exists, check_source_name
from lqexport.recipe import Recipe
from lqexport.runtime.progress import terminal_listener

if TYPE_CHECKING:
    from lqexport.planning.dryrun import Preview
    from lqexport.planning.memory import MemoryLimits
    from lqexport.runtime.placement import Placement
    from lqexport.runtime.progress import Listener

RESUME = "Stopped. Run the same command again to go on from the last finished tensor."


@with_recipe_options(target="[required, here or in the --recipe file]")
def quantize(
    source: SourceModel,
    out: Annotated[Path, typer.Argument(help="Folder to write: new, empty, or of the same run, which then goes on.")],
    options: dict[str, Any],
    recipe_file: RecipeFile = None,
    dry_run: DryRun = False,
    verbose: Verbose = False,
    as_json: Json = False,
    device: Device = "auto",
    device_memory: DeviceMemory = None,
    host_memory: HostMemory = None,
    cache: Cache = None,
) -> None:
    """Quantize SOURCE into the folder OUT.

    A stopped run goes on when the same command is given again.

    Examples:

        lqexport quantize ./model ./out --target gguf:Q4_K_M --dry-run
        lqexport quantize ./model ./out --target gguf:Q3_K --calibration wikitext2
        lqexport quantize ./model ./out --size 4.25bpw
        lqexport quantize model.gguf ./out --target native:table-3 --recipe recipe.toml
    """
    with plain_endings(RESUME):
        recipe = merged_recipe(recipe_file, options | {"source": source})
        check_source_name(source)
        run = Run(recipe, out, device, cache, device_memory, host_memory)
        _quantize(run, dry_run=dry_run, verbose=verbose, as_json=as_json)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of the solver, as given on the command line."""

    recipe: Recipe
    out: Path
    device: str
    cache: Path | None
    device_memory: str | None
    host_memory: str | None

    @functools.cached_property
    def limits(self) -> MemoryLimits:
        """The memory to fit into: asked once, so that the run has the limits that were shown."""
        return memory_limits(self.device, self.device_memory, self.host_memory)

    def placement(self, shown: Preview) -> Placement:
        """Returns where the run keeps large tensors."""
        from lqexport.planning.memory import choose_placement
        from lqexport.runtime.environment import choose_device

        return choose_placement(shown.work, choose_device(self.device), self.out, self.limits)

    def quantize(self, listener: Listener | None = None) -> dict[str, Any]:
        """Runs, and returns the report."""
        from lqexport.pipeline.quantize import quantize as run

        return run(self.recipe, self.out, device=self.device, cache=self.cache, listener=listener, limits=self.limits)


def memory_limits(device: str, device_memory: str | None, host_memory: str | None) -> MemoryLimits:
    """Returns the given limits, such as 24GB, and what is free where one is not given."""
    from lqexport.planning.memory import MemoryLimits, available
    from lqexport.runtime.environment import choose_device
    from lqexport.sizes import memory_size

    free = available(choose_device(device))
    given = [memory_size(size) if size else None for size in (device_memory, host_memory)]
    return MemoryLimits(given[0] or free.device, given[1] or free.host)


def _quantize(run: Run, *, dry_run: bool, verbose: bool, as_json: bool) -> None:
    """Shows the plan; then, unless it is a dry run, checks the disk and runs."""
    from lqexport.planning.dryrun import as_json as preview_json
    from lqexport.planning.dryrun import preview
    from lqexport.runtime.environment import choose_device

    if is_another_process():
        if not dry_run:
            run.quantize()
        return
    choose_device(run.device)  # an unknown device is said before the source is read
    shown = preview(run.recipe, run.out)
    placement = run.placement(shown)
    if not as_json:
        print_plan(shown, placement, verbose=verbose, estimates=dry_run)
    if dry_run and as_json:
        print_json(preview_json(shown, placement))
    shown.check_disk()
    if dry_run:
        return
    with terminal_listener() as listener:
        report = run.quantize(listener)
    if as_json:
        print_json(report)
    else:
        _show_report(run, report)


def is_another_process() -> bool:
    """Returns whether this is one of several processes that torchrun started, and not the first, which alone prints."""
    return int(os.environ.get("RANK", 0)) > 0


def print_plan(shown: Preview, placement: Placement, *, verbose: bool, estimates: bool) -> None:
    """Prints types and fallbacks, and with `estimates` what the run would cost."""
    from lqexport.planning.dryrun import show_estimates, show_plan

    console = output()
    show_plan(shown, console, verbose)
    if estimates:
        show_estimates(shown, console, placement)


def _show_report(run: Run, report: dict[str, Any]) -> None:
    """Prints what the run found out, and the command that comes next."""
    if "budget" in report:
        _show_types(run, report["budget"])
    if "tuning" in report:
        _show_tuning(report["tuning"])
    if "correction" in report:
        from lqexport.pipeline.ranks import sentences

        print("\n".join(sentences(report["correction"])))
    adapter = ["--adapter", "adapter.gguf"] if report.get("correction", {}).get("factor_bytes") else []
    family = run.recipe.parsed_target.family
    written = ["model.gguf", *adapter] if family == "gguf" else ["FOLDER"]
    print(f"Wrote {run.out}. Next: {shlex.join(['lqexport', f'to-{family}', str(run.out), *written])}")


def _show_tuning(tuning: dict[str, Any]) -> None:
    loss, name = ("kl", "KL") if "held_out_kl_after" in tuning else ("distance", "cosine distance")
    before, after = (tuning[f"held_out_{loss}_{when}"] for when in ("before", "after"))
    print(f"Tuning: {name} on held-out calibration sequences {before:.4f} before, {after:.4f} after")


def _show_types(run: Run, choice: dict[str, Any]) -> None:
    """Prints the types that were chosen by size. Writes the curve of loss over bytes to OUT/budget.svg, if matplotlib
    is installed."""
    from lqexport.planning.dryrun import preview_of_finished, show_plan

    show_plan(preview_of_finished(run.recipe, run.out), output())
    print(f"Predicted KL: {choice['predicted_kl']:.4f}, at most {choice['predicted_kl_gap']:.1e} above the best choice")
    if importlib.util.find_spec("matplotlib"):
        from lqexport.verification.plots import save_budget_plot

        save_budget_plot(choice, run.out / "budget.svg")
        print(f"Loss against bytes: {run.out / 'budget.svg'}")


def plan(
    model: Annotated[Path, typer.Argument(help="A config.json, or a folder that holds one; no weights are needed.")],
    target: Annotated[
        str | None,
        typer.Option(help="What to quantize into, such as gguf:Q4_K_M. [required, here or in the --recipe file]"),
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="Memory of the GPU, such as 24GB. [default: no GPU]")] = None,
    host: Annotated[str | None, typer.Option(help="Memory of the machine, such as 64GB.")] = None,
    recipe_file: Annotated[Path | None, typer.Option("--recipe", help="TOML file of the options of quantize.")] = None,
    as_json: Json = False,
) -> None:
    """Memory, disk, operations and hours that quantizing would take, from a config.json alone.

    Exit status 1 if it does not fit.

    Examples:

        lqexport plan ./config.json --target gguf:Q4_K_M --gpu 24GB --host 64GB
        lqexport plan ./model --target native:table-3 --json
    """
    with plain_endings():
        check_exists(model)
        from lqexport.planning.forecast import forecast, show

        recipe = merged_recipe(recipe_file, {"source": str(model), "target": target})
        result = forecast(model, recipe, gpu, host)
        if as_json:
            print_json(result.as_json())
        else:
            show(result, output())
        too_large = result.too_large
    if too_large:
        raise typer.Exit(1)
