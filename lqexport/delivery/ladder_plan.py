"""Shows size, memory and time of every file of a ladder, before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from lqexport.delivery.ladder import Rung
from lqexport.delivery.summary import duration
from lqexport.planning.dryrun import as_json
from lqexport.planning.memory import MemoryLimits, choose_placement
from lqexport.runtime.environment import choose_device
from lqexport.sizes import human_bytes

SHOWN = ("target", "bits_per_weight", "tensor_bytes", "estimated_memory_bytes", "estimated_seconds", "warnings")


def planned_files(rungs: Sequence[Rung], device: str, limits: MemoryLimits) -> list[dict[str, Any]]:
    """Returns the figures of every file as JSON values, as `export --dry-run` has them for one."""
    chosen = choose_device(device)
    files = []
    for rung in rungs:
        placement = choose_placement(rung.preview.work, chosen, rung.request.places.artifact, limits)
        figures = as_json(rung.preview, placement)
        name = rung.request.places.model.name
        files.append({"file": name, "finished": rung.finished, **{key: figures[key] for key in SHOWN}})
    return files


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
