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

from lqexport.artifact import Artifact
from lqexport.budget import chosen_types
from lqexport.converters.architectures import architecture_of
from lqexport.converters.plan import PlannedTensor
from lqexport.errors import UserError
from lqexport.inspect import Entry, bits, human_bytes, size, table
from lqexport.job import plan_factors, plan_recipe
from lqexport.recipe import Recipe
from lqexport.source import open_source
from lqexport.tune import HELD_OUT

PROCESS_BYTES = 700_000_000
"""What Python with torch, transformers and numba takes before any model is read."""

FIT_SECONDS_PER_WEIGHT = 0.2e-6
"""Fitting a grid, on one core: bound by memory and branches, not by the rate of matrix products."""

SOLVER_SHARE = 0.1
"""The rate of error feedback and descent, which go column by column, as a share of that of large matrix products."""


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
    def entries(self) -> list[Entry]:
        return [Entry(tensor.name, tensor.shape, tensor.codec, tensor.nbytes) for tensor in self.tensors]

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
    artifact = Artifact(out)
    tensors = plan_recipe(source, recipe, chosen_types(artifact))
    tensors += plan_factors(source, tensors, recipe)
    already = sum(tensor.nbytes for tensor in tensors if tensor.name in artifact)
    existing = next(folder for folder in [out, *out.absolute().parents] if folder.is_dir())
    return Preview(recipe, out, source.config, tensors, already, shutil.disk_usage(existing).free)


def fallbacks(tensors: Iterable[PlannedTensor]) -> list[str]:
    """One sentence per sort of fallback."""
    sorts = Counter((tensor.wanted, tensor.codec, tensor.reason) for tensor in tensors if tensor.reason)
    return [
        f"{count} tensors take {codec} instead of {wanted}: {reason}"
        for (wanted, codec, reason), count in sorts.items()
    ]


def memory_estimate(shown: Preview) -> int:
    """Bytes at the peak: the process, hidden states of all samples, a decoder block in float32, the
    second moments of its inputs, and the arrays that solving its largest linear takes."""
    recipe, hidden = shown.recipe, shown.config["hidden_size"]
    states = 4 * recipe.samples * recipe.sequence_length * hidden
    block = _first_block(shown)
    moments = sum(4 * columns**2 for columns in _inputs(shown, block))
    largest = max((tensor.weights for tensor in block), default=0)
    widest = max((tensor.matrix[1] for tensor in block), default=0)
    embedding = max(tensor.weights for tensor in shown.tensors)
    blocks = 4 * sum(tensor.weights for tensor in block)
    return PROCESS_BYTES + max(states + blocks + moments + 8 * 4 * largest + 4 * 4 * widest**2, 2 * 4 * embedding)


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of a run.

    passes    matrix products of the forward and backward passes, in the recipe's `compute_dtype`
    moments   second moments and their factors
    solver    error feedback and descent
    """

    passes: float = 0.0
    moments: float = 0.0
    solver: float = 0.0


def operations_estimate(shown: Preview) -> Operations:
    """What a run from nothing computes."""
    recipe, linears = shown.recipe, [tensor for tensor in shown.tensors if tensor.linear]
    if recipe.method == "rtn":
        return Operations()
    tokens = recipe.samples * recipe.sequence_length
    attention = 4 * recipe.sequence_length * shown.config["hidden_size"] * shown.config["num_hidden_layers"]
    forward = 2 * sum(tensor.weights for tensor in linears) + attention  # per token
    moments = sum(tokens * columns**2 for columns in _moments_columns(shown, linears))  # one half of the matrix
    factors = sum(2 * columns**3 for columns in _inputs(shown, linears))
    per_column = 1 + 2 * recipe.descent
    solver = sum(per_column * tensor.weights * tensor.matrix[1] for tensor in linears)
    return Operations(_passes(shown) * tokens * forward + _tuning(shown, forward), moments + factors, solver)


def _passes(shown: Preview) -> int:
    """Forward passes over the calibration tokens, a backward pass by the inputs alone counted as one."""
    if shown.recipe.prefix == "quantized":
        return (1 + len(architecture_of(shown.config).linears)) * (1 + shown.recipe.asymmetric)
    return 3 if shown.recipe.moments == "guided" else 1


def _moments_columns(shown: Preview, linears: list[PlannedTensor]) -> list[int]:
    """Widths of the inputs whose second moments are summed: guided ones are of each linear, not of each group."""
    recipe = shown.recipe
    if recipe.moments != "guided":
        return _inputs(shown, linears)
    return [tensor.matrix[1] for tensor in linears] * recipe.output_groups


def _tuning(shown: Preview, forward: float) -> float:
    """Operations of end-to-end tuning: for each token a pass of the source, and one forward, again, and backward."""
    recipe = shown.recipe
    if not recipe.tuned_sequences:
        return 0.0
    tokens = recipe.tuned_sequences * recipe.sequence_length
    head = 2 * max(tensor.weights for tensor in shown.tensors)
    return tokens * (5 * forward + 4 * head) + 3 * HELD_OUT * recipe.sequence_length * (forward + head)


def _first_block(shown: Preview) -> list[PlannedTensor]:
    prefix = f"{architecture_of(shown.config).blocks}.0."
    return [tensor for tensor in shown.tensors if tensor.name.startswith(prefix) and len(tensor.shape) == 2]


def _inputs(shown: Preview, tensors: Iterable[PlannedTensor]) -> list[int]:
    """Widths of the different inputs of some linears; those of a group share one."""
    firsts = tuple(f".{group[0]}.weight" for group in architecture_of(shown.config).linears)
    return [tensor.matrix[1] for tensor in tensors if tensor.name.endswith(firsts)]


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


def seconds_estimate(shown: Preview, rate: float, passes_rate: float) -> float:
    """Seconds of a run from nothing, where large matrix products take `rate` floating-point operations per second in
    float32 and `passes_rate` in the recipe's `compute_dtype`."""
    operations = operations_estimate(shown)
    matrices = sum(tensor.weights for tensor in shown.tensors if len(tensor.shape) == 2)
    fitting = matrices * FIT_SECONDS_PER_WEIGHT / torch.get_num_threads()
    solving = operations.solver / (SOLVER_SHARE * rate)
    return operations.passes / passes_rate + operations.moments / rate + solving + fitting


def _seconds_here(shown: Preview, device: str) -> float:
    dtype = getattr(torch, shown.recipe.compute_dtype_on(torch.device(device).type))
    return seconds_estimate(shown, measured_rate(device, torch.float32), measured_rate(device, dtype))


def as_json(shown: Preview, device: str) -> dict[str, Any]:
    """Everything that a dry run says."""
    return {
        "target": shown.recipe.target,
        "bits_per_weight": bits(shown.entries),
        "tensor_bytes": size(shown.entries),
        "estimated_memory_bytes": memory_estimate(shown),
        "estimated_seconds": _seconds_here(shown, device),
        "free_disk_bytes": shown.free,
        "already_written_bytes": shown.already,
        "fallbacks": fallbacks(shown.tensors),
        "tensors": [vars(tensor) | {"nbytes": tensor.nbytes} for tensor in shown.tensors],
    }


def show_plan(shown: Preview, console: Console, every: bool = False) -> None:
    """Print the types, the fallbacks and the size."""
    console.print(table(shown.entries, every))
    if shown.recipe.size and not chosen_types(Artifact(shown.out)):
        console.print(f"These types will be chosen anew, to fit {shown.recipe.size}.", markup=False, highlight=False)
    if shown.recipe.bits is not None and shown.recipe.method != "rtn":
        console.print("Widths: even here; the run measures what each mix costs and takes the best of this size.")
    for sentence in fallbacks(shown.tensors):
        console.print(f"Fallback: {sentence}", markup=False, highlight=False)


def show_estimates(shown: Preview, console: Console, device: str) -> None:
    """Print what the run would cost, and what the disk has."""
    minutes = _seconds_here(shown, device) / 60
    lines = (
        f"Tensor data: {human_bytes(size(shown.entries))}, {bits(shown.entries):.3f} bits per weight",
        f"Peak memory: about {human_bytes(memory_estimate(shown))} (estimate)",
        f"Time on {device}: about {minutes:.1f} minutes (estimate from a measured matrix product)",
        f"Disk: needs {human_bytes(shown.missing_bytes)}, has {human_bytes(shown.free)} free",
    )
    for line in lines:
        console.print(line, markup=False, highlight=False)
