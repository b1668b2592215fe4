"""The least seconds that a machine could take for each stage of a run.

They are operations divided by the rate of the machine's large matrix products, and bytes divided by the rate of its
disk. Both rates are measured when the script runs. `bench/depth.py` prints the floors beside the measured seconds.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lqexport.models.source import open_source
from lqexport.planning.cost import Work, disk, operations_estimate, passes, source_bytes, source_passes
from lqexport.planning.rates import measured_rate
from lqexport.planning.recipe_plan import plan_recipe
from lqexport.recipe import Recipe
from lqexport.runtime.environment import full_float32

WINDOW = 512
"""The tokens that `verify` runs through both models."""


@dataclass(frozen=True)
class Machine:
    """The rates of a machine.

    float32, passes, float64   operations per second of large matrix products, by dtype; `passes` is that of the passes
    read, write   bytes per second of the disk
    """

    float32: float
    passes: float
    float64: float
    read: float
    write: float

    def moves(self, read: float, written: float) -> float:
        """Returns the seconds for reading and writing these numbers of bytes."""
        return read / self.read + written / self.write


def measured(folder: Path, device: str, passes: str) -> Machine:
    """Measures this machine: the disk that holds `folder`, and `device`, whose passes have the dtype `passes`."""
    full_float32()
    size = 4096 if device.startswith("cuda") else 1024
    dtypes = (torch.float32, getattr(torch, passes), torch.float64)
    return Machine(*(measured_rate(device, dtype, size) for dtype in dtypes), *_disk(folder / "disk"))


def _disk(path: Path, times: int = 32) -> tuple[float, float]:
    """Returns the bytes per second that the disk reads and writes."""
    content = os.urandom(1 << 24)
    began = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(times):
            file.write(content)
        os.fsync(file.fileno())
        written = time.perf_counter() - began
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that the disk is read, not the cache
    began = time.perf_counter()
    with path.open("rb") as file:
        while file.read(len(content)):
            pass
    read = time.perf_counter() - began
    path.unlink()
    return times * len(content) / read, times * len(content) / written


def work_of(artifact: Path) -> Work:
    """Returns the work of a run from its run.json."""
    recipe = Recipe(**json.loads((artifact / "run.json").read_text(encoding="utf-8"))["recipe"])
    source = open_source(recipe.source)
    return Work(recipe, source.config, plan_recipe(source, recipe))


def floors(work: Work, machine: Machine) -> dict[str, tuple[float, float]]:
    """Returns the least seconds of each stage: for its operations, and for its bytes.

    A byte goes to or from the disk once if the cache could hold it. Guided passes also move the inputs of all blocks.
    """
    untuned = replace(work, recipe=replace(work.recipe, tune=0))
    operations, tuned = operations_estimate(untuned), operations_estimate(work).passes
    # Tensors that are not solved are part of the forward pass too.
    forward = 2 * sum(work.share(tensor) * tensor.weights for tensor in work.tensors if ".layers." in tensor.name)
    passed = passes(work) * work.tokens * forward * work.calibrated
    source, states = source_bytes(work), disk(untuned).work
    stored, solved = (sum(tensor.nbytes for tensor in tensors) for tensors in (work.tensors, work.linears))
    halfs = 2 * sum(tensor.weights for tensor in work.linears)
    return {
        "rounding": (0.0, machine.moves(source - halfs, stored - solved)),
        "passes": (
            passed / machine.passes + (operations.moments + operations.targets) / machine.float32,
            machine.moves(source_passes(work) * source + states, states),
        ),
        "solving": (
            operations.factors / machine.float64 + operations.solver / machine.float32,
            machine.moves(halfs, solved),
        ),
        "tuning": ((tuned - operations.passes) / machine.passes, machine.moves(source + stored, solved)),
        "to-gguf": (0.0, machine.moves(stored, stored)),
        "verify": (2 * WINDOW * forward / machine.float32, machine.moves(source + stored, 0)),
    }
