"""What a run would do and cost, told before any work."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lqexport.converters.plan import PlannedTensor
from lqexport.errors import UserError
from lqexport.models.inspect import TensorInfo, bits, size, table
from lqexport.models.source import open_source
from lqexport.models.source_grids import sentences
from lqexport.planning.cost import Rates, Work, seconds_estimate
from lqexport.planning.defaults import settled
from lqexport.planning.memory import memory_estimate, told
from lqexport.planning.recipe_plan import plan_factors, plan_recipe
from lqexport.recipe import Recipe
from lqexport.runtime.placement import Placement
from lqexport.sizes import human_bytes
from lqexport.storage.artifact import Artifact


@dataclass(frozen=True)
class Preview:
    """What a run would do.

    tensors   every tensor and its codec
    already   bytes of tensors that the output folder holds from an earlier, stopped run
    free      bytes free on the output's disk
    """

    recipe: Recipe
    out: Path
    config: dict[str, Any]
    tensors: list[PlannedTensor]
    already: int
    free: int

    @property
    def entries(self) -> list[TensorInfo]:
        return [TensorInfo(tensor.name, tensor.shape, tensor.codec_name, tensor.nbytes) for tensor in self.tensors]

    @property
    def work(self) -> Work:
        """What the estimates are of."""
        return Work(self.recipe, self.config, self.tensors)

    @property
    def missing_bytes(self) -> int:
        """What the run has yet to write."""
        return size(self.entries) - self.already

    def check_disk(self) -> None:
        """Raises UserError where the artifact does not fit on the disk."""
        if self.missing_bytes > self.free:
            raise UserError(
                f"The artifact needs {human_bytes(self.missing_bytes)} more, and the disk has {human_bytes(self.free)} "
                "free. Free some space or choose another output folder."
            )


def preview(recipe: Recipe, out: Path) -> Preview:
    """Plan a run: reads names and shapes only. Raises UserError as `plan` and `open_source` do."""
    source = open_source(recipe.source)
    recipe = settled(recipe, source.config)
    artifact = Artifact(out)
    tensors = plan_recipe(source, recipe, artifact.chosen_types())
    tensors += plan_factors(source, tensors, recipe)
    already = sum(tensor.nbytes for tensor in tensors if tensor.name in artifact)
    existing = next(folder for folder in [out, *out.absolute().parents] if folder.is_dir())
    return Preview(recipe, out, source.config, tensors, already, shutil.disk_usage(existing).free)


def fallbacks(tensors: Iterable[PlannedTensor]) -> list[str]:
    """One sentence per sort of fallback."""
    sorts = Counter((tensor.wanted, tensor.codec_name, tensor.reason) for tensor in tensors if tensor.reason)
    return [
        f"{count} tensors take {codec} instead of {wanted}: {reason}"
        for (wanted, codec, reason), count in sorts.items()
    ]


def measured_rate(device: str, dtype: torch.dtype, size: int = 1024, seconds: float = 0.3) -> float:
    """Floating-point operations per second of matrix products of `size`, measured for about `seconds`."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    synchronize: Callable[[], None] = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds or best == float("inf"):
        start = time.perf_counter()
        left @ right
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def measured_rates(device: str, recipe: Recipe) -> Rates:
    """Those of matrix products on a device, in the types that a run of `recipe` multiplies in."""
    dtypes = (torch.float32, getattr(torch, recipe.compute_dtype_on(torch.device(device).type)), torch.float64)
    return Rates(*(measured_rate(device, dtype) for dtype in dtypes))


def _seconds_here(shown: Preview, placement: Placement) -> float:
    rates = measured_rates(str(placement.device), shown.recipe)
    return seconds_estimate(shown.work, rates, torch.get_num_threads(), placement.parts)


def as_json(shown: Preview, placement: Placement) -> dict[str, Any]:
    """Everything that a dry run says."""
    return {
        "target": shown.recipe.target,
        "bits_per_weight": bits(shown.entries),
        "tensor_bytes": size(shown.entries),
        "estimated_memory_bytes": memory_estimate(shown.work, placement),
        "memory_choices": {
            "moments": placement.moments.name,
            "factors": placement.cholesky.name,
            "rows": placement.rows,
            "parts": placement.parts,
        },
        "estimated_seconds": _seconds_here(shown, placement),
        "free_disk_bytes": shown.free,
        "already_written_bytes": shown.already,
        "fallbacks": fallbacks(shown.tensors),
        "tensors": [tensor.as_json() for tensor in shown.tensors],
    }


def show_plan(shown: Preview, console: Console, every: bool = False) -> None:
    """Print the types, the fallbacks and the size."""
    console.print(table(shown.entries, every))
    if shown.recipe.size and not Artifact(shown.out).chosen_types():
        console.print(f"These types will be chosen anew, to fit {shown.recipe.size}.", markup=False, highlight=False)
    if shown.recipe.bits is not None and shown.recipe.method != "rtn":
        console.print("Widths: even here; the run measures what each mix costs and takes the best of this size.")
    for sentence in sentences(shown.tensors):
        console.print(sentence, markup=False, highlight=False)
    for sentence in fallbacks(shown.tensors):
        console.print(f"Fallback: {sentence}", markup=False, highlight=False)


def show_estimates(shown: Preview, console: Console, placement: Placement) -> None:
    """Print what the run would cost, and what the disk has."""
    minutes = _seconds_here(shown, placement) / 60
    lines = (
        f"Tensor data: {human_bytes(size(shown.entries))}, {bits(shown.entries):.3f} bits per weight",
        f"Peak memory: about {human_bytes(memory_estimate(shown.work, placement))} (estimate)",
        told(placement),
        f"Time on {placement.device}: about {minutes:.1f} minutes (estimate from a measured matrix product)",
        f"Disk: needs {human_bytes(shown.missing_bytes)}, has {human_bytes(shown.free)} free",
    )
    for line in lines:
        console.print(line, markup=False, highlight=False)
