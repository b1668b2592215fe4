"""Shows size, memory and time of every file of a ladder, before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from lqexport.delivery.ladder import Rung
from lqexport.delivery.summary import duration
from lqexport.planning.compute_dtype import with_compute_dtype
from lqexport.planning.cost import shared_seconds
from lqexport.planning.dryrun import as_json
from lqexport.planning.memory import MemoryLimits, choose_placement
from lqexport.planning.rates import measured_rates
from lqexport.runtime.environment import choose_device
from lqexport.runtime.placement import Placement
from lqexport.sizes import human_bytes

SHOWN = ("target", "bits_per_weight", "tensor_bytes", "estimated_memory_bytes", "estimated_seconds", "warnings")


def planned_files(rungs: Sequence[Rung], device: str, limits: MemoryLimits) -> list[dict[str, Any]]:
    """Returns the figures of every file as JSON values, as `export --dry-run` has them for one.

    The time that files share is that of the first of them.
    """
    chosen = choose_device(device)
    counted: set[tuple[object, ...]] = set()
    files = []
    for rung in rungs:
        placement = choose_placement(rung.preview.work, chosen, rung.request.places.artifact, limits)
        figures = as_json(rung.preview, placement)
        figures["estimated_seconds"] -= _spared_seconds(rung, placement, counted)
        name = rung.request.places.model.name
        files.append({"file": name, "finished": rung.finished, **{key: figures[key] for key in SHOWN}})
    return files


def _spared_seconds(rung: Rung, placement: Placement, counted: set[tuple[object, ...]]) -> float:
    """Returns the seconds that a file does not take because a file before it has the same second moments.

    counted   what tells apart the second moments of the files before; those of this file are added
    """
    if rung.finished or rung.request.cache is None:
        return 0.0
    device = placement.device
    recipe, _ = with_compute_dtype(rung.preview.work, device.type, None)
    dtype = recipe.compute_dtype_on(device.type)
    moments = (recipe.moments, recipe.smooth, dtype)
    if moments not in counted:
        counted.add(moments)
        return 0.0
    return shared_seconds(rung.preview.work, measured_rates(str(device), dtype))


def table(files: Sequence[dict[str, Any]]) -> Table:
    """Returns the table of a dry run. Finished files take no more time."""
    result = Table(box=None, pad_edge=False, show_footer=True)
    missing = [file for file in files if not file["finished"]]
    total = duration(sum(file["estimated_seconds"] for file in missing))
    result.add_column("file", overflow="fold", footer="all that is not there yet")
    footers = {
        "size": human_bytes(sum(file["tensor_bytes"] for file in missing)), "bits": "", "memory": "", "time": total,
    }  # fmt: skip
    for title, footer in footers.items():
        result.add_column(title, justify="right", no_wrap=True, footer=footer)
    for file in files:
        result.add_row(
            file["file"], human_bytes(file["tensor_bytes"]), f"{file['bits_per_weight']:.3f}",
            human_bytes(file["estimated_memory_bytes"]),
            "finished" if file["finished"] else f"about {duration(file['estimated_seconds'])}",
        )  # fmt: skip
    return result
