"""`plan`: what quantizing a model would take, from its config.json alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lqexport.models.modules import expected_shapes
from lqexport.planning.cost import Rates, Work, disk, operations_estimate, seconds_estimate
from lqexport.planning.defaults import settled
from lqexport.planning.dryrun import measured_rates
from lqexport.planning.memory import Memory, MemoryLimits, choose_placement, memory, peak, told
from lqexport.planning.recipe_plan import plan_factors, plan_recipe
from lqexport.recipe import Recipe
from lqexport.runtime.placement import Placement
from lqexport.sizes import human_bytes, memory_size
from lqexport.storage.config_check import read_config

ASSUMED_GPU = Rates(float32=17.8e12, passes=35.5e12, float64=0.28e12)
"""Half of what the data sheet of a card with 24 GB (RTX 3090) says. Nothing of it was measured."""
HOST_THREADS = 8
"""Assumed beside a GPU."""


class ConfigModel:
    """Names and shapes of a model's tensors, from its config.json: there are no weights."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self._shapes = expected_shapes(config)

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]


@dataclass(frozen=True)
class Forecast:
    """What a run would take; `gpu` and `host` are the bytes that there are, None where not said."""

    work: Work
    gpu: int | None
    host: int | None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.gpu is None else "cuda")

    @property
    def limits(self) -> MemoryLimits:
        return MemoryLimits(self.gpu, self.host)

    @cached_property
    def placement(self) -> Placement:
        """Where things would be kept to fit."""
        return choose_placement(self.work, self.device, Path(), self.limits)

    @property
    def stages(self) -> dict[str, Memory]:
        """What each needs; without a GPU all of it on the host."""
        stages = memory(self.work, self.placement)
        if self.gpu is not None:
            return stages
        return {name: Memory(0, stage.device + stage.host) for name, stage in stages.items()}

    @property
    def too_large(self) -> list[str]:
        """One sentence for each stage that does not fit."""
        return [
            f"{name} takes {human_bytes(takes)} of the {place}'s {human_bytes(there)}"
            for name, stage in self.stages.items()
            for place, takes, there in self.limits.excess(stage, self.device)
        ]

    def rates(self) -> Rates:
        """Assumed of a GPU, measured of this machine's CPU."""
        return measured_rates("cpu", self.work.recipe) if self.gpu is None else ASSUMED_GPU

    def as_json(self) -> dict[str, Any]:
        """Everything, in bytes, operations and hours."""
        work, rates = self.work, self.rates()
        weights, nbytes = sum(t.weights for t in work.tensors), sum(t.nbytes for t in work.tensors)
        threads = torch.get_num_threads() if self.gpu is None else HOST_THREADS
        return {
            "target": work.recipe.target,
            "weights": weights,
            "tensor_bytes": nbytes,
            "bits_per_weight": 8 * nbytes / weights,
            "memory": {name: asdict(stage) for name, stage in self.stages.items()},
            "peak": asdict(peak(self.stages)),
            "choices": told(self.placement),
            "too_large": self.too_large,
            "disk": asdict(disk(work, self.placement.parts)),
            "operations": asdict(operations_estimate(work, self.placement.parts)),
            "rates": asdict(rates) | {"measured": self.gpu is None},
            "hours": seconds_estimate(work, rates, threads, self.placement.parts) / 3600,
        }


def forecast(model: Path, recipe: Recipe, gpu: str | None, host: str | None) -> Forecast:
    """Plan a run for a config.json, or the folder that holds one. Raises UserError as the planning does."""
    path = model / "config.json" if model.is_dir() else model
    shapes = ConfigModel(read_config(path, f"There is no {path}: give a config.json, or a folder that holds one."))
    recipe = settled(recipe, shapes.config)
    tensors = plan_recipe(shapes, recipe)
    tensors += plan_factors(shapes, tensors, recipe)
    return Forecast(
        Work(recipe, shapes.config, tensors), *(memory_size(size) if size else None for size in (gpu, host))
    )


def show(found: Forecast, console: Console) -> None:
    """Print it, and what of it was measured."""
    content = found.as_json()
    weights, size = f"{content['weights'] / 1e9:.2f} billion weights", human_bytes(content["tensor_bytes"])
    line = f"{weights} in {content['target']}: {size}, {content['bits_per_weight']:.3f} bits per weight"
    console.print(line, markup=False, highlight=False)
    console.print(_table(found))
    for sentence in _sentences(found, content):
        console.print(sentence, markup=False, highlight=False)


def _table(found: Forecast) -> Table:
    table = Table(box=None, pad_edge=False, show_footer=True)
    most = peak(found.stages)
    table.add_column("peak memory", "all")
    if found.gpu is not None:
        table.add_column("device", human_bytes(most.device), justify="right")
    table.add_column("host", human_bytes(most.host), justify="right")
    for name, stage in found.stages.items():
        device = [human_bytes(stage.device)] if found.gpu is not None else []
        table.add_row(name, *device, human_bytes(stage.host))
    return table


def _sentences(found: Forecast, content: dict[str, Any]) -> list[str]:
    kept, operations = content["disk"], content["operations"]
    parts = ", ".join(f"{name} {count:.2g}" for name, count in operations.items())
    where = "this machine's CPU, by its measured matrix products"
    if found.gpu is not None:
        where = "one GPU at assumed rates (half of an RTX 3090's data sheet); no GPU has been timed"
    return [
        content["choices"],
        *(f"Does not fit: {sentence}" for sentence in found.too_large),
        f"Disk: {human_bytes(kept['artifact'])} stay, {human_bytes(kept['work'])} more while it runs",
        f"Moved: {human_bytes(kept['read'])} read, {human_bytes(kept['written'])} written",
        f"Operations: {sum(operations.values()):.3g} ({parts})",
        f"Time: about {content['hours']:.1f} hours on {where}",
        "All of it is computed from shapes. The memory formulas were compared with measured runs on a CPU alone.",
    ]
