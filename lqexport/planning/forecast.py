"""`plan`: estimates what quantizing a model would take, from its config.json alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lqexport.converters.counting import copied_output, counted
from lqexport.converters.gguf.mixes import other_meaning
from lqexport.converters.models.architectures import architecture_of, normalized
from lqexport.converters.models.further import further_shapes
from lqexport.models.latent import of_drafting
from lqexport.models.modules import expected_shapes
from lqexport.planning.compute_dtype import with_compute_dtype
from lqexport.planning.cost import Rates, Work, disk, operations_estimate
from lqexport.planning.defaults import by_effort
from lqexport.planning.efforts import effort_sentence, seconds_by_effort
from lqexport.planning.memory import Memory, MemoryLimits, choose_placement, memory, peak, placement_sentence
from lqexport.planning.rates import measured_rates
from lqexport.planning.recipe_plan import plan_factors, plan_recipe, size_limit, spared_bytes
from lqexport.planning.type_choices import check_size
from lqexport.recipe import ComputeDtype, Effort, Recipe
from lqexport.runtime.placement import Placement
from lqexport.runtime.shown import Shown
from lqexport.sizes import human_bytes, memory_size
from lqexport.storage.config_check import read_config

ASSUMED_GPU = Rates(float32=17.8e12, passes=35.5e12, float64=0.28e12)
"""Assumed rates of a GPU: half of the data sheet of a card with 24 GB (RTX 3090). They were not measured."""
HOST_THREADS = 8
"""Assumed number of CPU threads of a machine with a GPU."""


class ConfigModel:
    """The names and shapes of a model's tensors, computed from its config.json. It has no weights."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = normalized(config)
        shapes = expected_shapes(self.config)
        self._shapes = shapes | further_shapes(architecture_of(self.config), self.config, shapes)

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]


@dataclass(frozen=True, repr=False)
class Forecast(Shown):
    """The estimates of a run.

    gpu       bytes of the GPU's memory; None for a run on the CPU
    host      bytes of the host's memory; None if not given
    efforts   the recipe as it would be at each effort
    spared    bytes that the types to be chosen for a size will take less than those of `work`
    """

    work: Work
    gpu: int | None
    host: int | None
    efforts: dict[Effort, Recipe] = field(default_factory=dict)
    spared: int = 0

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.gpu is None else "cuda")

    @property
    def limits(self) -> MemoryLimits:
        return MemoryLimits(self.gpu, self.host)

    @cached_property
    def placement(self) -> Placement:
        """The places where the run would keep its large tensors, to fit into the memory."""
        return choose_placement(self.work, self.device, Path(), self.limits)

    @property
    def compute_dtype(self) -> ComputeDtype:
        """The dtype that the passes would multiply in."""
        return with_compute_dtype(self.work, self.device.type, None)[0].compute_dtype_on(self.device.type)

    @property
    def stages(self) -> dict[str, Memory]:
        """Stage -> memory that it needs. Without a GPU all of it is the host's."""
        stages = memory(self.work, self.placement)
        if self.gpu is not None:
            return stages
        return {name: Memory(0, stage.device + stage.host) for name, stage in stages.items()}

    @property
    def too_large(self) -> list[str]:
        """One sentence for each stage that does not fit into the memory."""
        return [
            f"{name} takes {human_bytes(nbytes)} of the {location}'s {human_bytes(limit)}"
            for name, stage in self.stages.items()
            for location, nbytes, limit in self.limits.excess(stage, self.device)
        ]

    def rates(self, compute_dtype: ComputeDtype) -> Rates:
        """Returns the assumed rates of a GPU, or the measured rates of this machine's CPU.

        `compute_dtype` is that of the passes.
        """
        return measured_rates("cpu", compute_dtype) if self.gpu is None else ASSUMED_GPU

    def as_json(self) -> dict[str, Any]:
        """Returns all estimates as JSON values, in bytes, operations and hours."""
        work, rates_in, effort = self.work, self.rates, self.work.recipe.effort
        count = counted(work.tensors, copied_output(work.config))
        nbytes = count.nbytes - self.spared
        threads = torch.get_num_threads() if self.gpu is None else HOST_THREADS
        seconds = seconds_by_effort(work, self.efforts or {effort: work.recipe}, self.placement, threads, rates_in)
        hours = {each: time / 3600 for each, time in seconds.items()}
        return {
            "target": work.recipe.target,
            "weights": count.weights,
            "tensor_bytes": nbytes,
            "bits_per_weight": 8 * nbytes / count.weights,
            "memory": {name: asdict(stage) for name, stage in self.stages.items()},
            "peak": asdict(peak(self.stages)),
            "choices": placement_sentence(self.placement),
            "too_large": self.too_large,
            "disk": asdict(disk(work, self.placement.parts)),
            "operations": asdict(operations_estimate(work, self.placement.parts, self.placement.held)),
            "rates": asdict(rates_in(self.compute_dtype)) | {"measured": self.gpu is None},
            "hours": hours[effort],
            "hours_by_effort": hours,
        }


def forecast(model: str | Path, recipe: Recipe, gpu: str | None = None, host: str | None = None) -> Forecast:
    """Plans a run for a config.json, or for the folder that holds one.

    gpu, host   sizes of the memories as text, such as "24GB"; None if not given

    Raises UserError if the config.json or a size cannot be read, or if the target cannot hold the model.
    """
    model = Path(model)
    path = model / "config.json" if model.is_dir() else model
    config = read_config(path, f"There is no {path}: give a config.json, or a folder that holds one.")
    drafts = recipe.mtp and recipe.parsed_target.family == "gguf"
    shapes = ConfigModel(of_drafting(config) if drafts else config)
    efforts = by_effort(recipe, shapes.config)
    recipe = efforts[recipe.effort]
    tensors = plan_recipe(shapes, recipe)
    limit = size_limit(shapes, recipe, tensors)
    check_size(recipe, tensors, limit)
    spared = spared_bytes(tensors, limit)
    tensors += plan_factors(shapes, tensors, recipe)
    gpu_bytes, host_bytes = (memory_size(size) if size else None for size in (gpu, host))
    return Forecast(Work(recipe, shapes.config, tensors), gpu_bytes, host_bytes, efforts, spared)


def show(estimate: Forecast, console: Console) -> None:
    """Prints a forecast, and says which figures were measured."""
    content = estimate.as_json()
    weights, size = f"{content['weights'] / 1e9:.2f} billion weights", human_bytes(content["tensor_bytes"])
    line = f"{weights} in {content['target']}: {size}, {content['bits_per_weight']:.3f} bits per weight"
    console.print(line, markup=False, highlight=False)
    console.print(_table(estimate))
    for sentence in _sentences(estimate, content):
        console.print(sentence, markup=False, highlight=False)


def _table(estimate: Forecast) -> Table:
    table = Table(box=None, pad_edge=False, show_footer=True)
    most = peak(estimate.stages)
    table.add_column("peak memory", "all")
    if estimate.gpu is not None:
        table.add_column("device", human_bytes(most.device), justify="right")
    table.add_column("host", human_bytes(most.host), justify="right")
    for name, stage in estimate.stages.items():
        device = [human_bytes(stage.device)] if estimate.gpu is not None else []
        table.add_row(name, *device, human_bytes(stage.host))
    return table


def _sentences(estimate: Forecast, content: dict[str, Any]) -> list[str]:
    disk_bytes, operations = content["disk"], content["operations"]
    parts = ", ".join(f"{name} {count:.2g}" for name, count in operations.items())
    where = "this machine's CPU, by its measured matrix products"
    if estimate.gpu is not None:
        where = "one GPU at assumed rates (half of an RTX 3090's data sheet); no GPU has been timed"
    return [
        *(f"Warning: {sentence}" for sentence in other_meaning(estimate.work.recipe.parsed_target)),
        content["choices"],
        *(f"Does not fit: {sentence}" for sentence in estimate.too_large),
        f"Disk: {human_bytes(disk_bytes['artifact'])} stay, {human_bytes(disk_bytes['work'])} more while it runs",
        f"Moved: {human_bytes(disk_bytes['read'])} read, {human_bytes(disk_bytes['written'])} written",
        f"Operations: {sum(operations.values()):.3g} ({parts})",
        f"Time: about {content['hours']:.1f} hours on {where}",
        effort_sentence(content["hours_by_effort"], "hours"),
        "All of it is computed from shapes. The memory formulas were compared with measured runs on a CPU alone.",
    ]
