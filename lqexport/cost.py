"""What a run costs, from shapes alone: memory on the device and the host, disk, bytes moved, operations, seconds.

Computed from what the code allocates, reads and multiplies, by counting; `tests/test_cost.py` compares the memory with
a measured run. The seconds and the solver's share were measured on a CPU: no GPU has been timed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from lqexport.collect import BATCH_TOKENS, GPU_BATCH_TOKENS, SHARDS
from lqexport.converters.architectures import architecture_of
from lqexport.converters.plan import PlannedTensor
from lqexport.formats.codec import GridCodec
from lqexport.formats.registry import codec
from lqexport.grid import TensorGrid
from lqexport.recipe import Recipe
from lqexport.tune import HELD_OUT, numbers

PROCESS_BYTES = 700_000_000
"""What Python with torch, transformers and numba takes before any model is read."""

FIT_SECONDS_PER_WEIGHT = 0.2e-6
"""Fitting a grid, on one core: bound by memory and branches, not by the rate of matrix products."""

UNPACK_SECONDS_PER_WEIGHT = 2e-9
"""Unpacking a stored weight on one core, which tuning does again at every step: 0.5 (Q4_K) to 2 (Q3_K) ns."""

SOLVER_SHARE = 0.1
"""The rate of error feedback and descent, which go column by column, as a share of that of large matrix products."""

SOLVER_MATRICES = 8
"""Float32 arrays of a linear's own shape that solving it holds at once."""
FACTOR_MATRICES = 3
"""Float64 arrays [C, C] that the factorization of its second moments holds at once."""

HIDDEN_STATES, INNER_STATES = 14, 6
"""Float32 numbers a token that a block's backward pass keeps: so many times the hidden and the MLP's width."""


@dataclass(frozen=True)
class Work:
    """A recipe for a model of this config.json, and every tensor that it stores."""

    recipe: Recipe
    config: dict[str, Any]
    tensors: list[PlannedTensor]

    @property
    def linears(self) -> list[PlannedTensor]:
        """Those of the decoder blocks."""
        prefix = f"{architecture_of(self.config).blocks}."
        return [tensor for tensor in self.tensors if tensor.linear and tensor.name.startswith(prefix)]

    @property
    def block(self) -> list[PlannedTensor]:
        """The matrices of the first decoder block."""
        prefix = f"{architecture_of(self.config).blocks}.0."
        return [tensor for tensor in self.linears if tensor.name.startswith(prefix)]

    @property
    def blocks(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def hidden(self) -> int:
        return int(self.config["hidden_size"])

    @property
    def tokens(self) -> int:
        """Calibration tokens."""
        return self.recipe.samples * self.recipe.sequence_length

    @property
    def outer(self) -> int:
        """Weights of the embedding, or of the output."""
        return int(self.config["vocab_size"]) * self.hidden

    @property
    def calibrated(self) -> bool:
        solved = any(tensor.linear for tensor in self.tensors)
        return solved and (self.recipe.method != "rtn" or bool(self.recipe.rank))

    @property
    def guided(self) -> bool:
        return self.recipe.moments == "guided"

    def inputs(self, tensors: Iterable[PlannedTensor]) -> list[int]:
        """Widths of the inputs whose second moments are kept: guided ones are of each linear, not of each group."""
        if self.guided:
            return [tensor.matrix[1] for tensor in tensors] * self.recipe.output_groups
        firsts = tuple(f".{group[0]}.weight" for group in architecture_of(self.config).linears)
        return [tensor.matrix[1] for tensor in tensors if tensor.name.endswith(firsts)]


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a stage, on the device and on the host; a CPU run needs the sum."""

    device: int
    host: int


def memory(work: Work, device: str) -> dict[str, Memory]:
    """What each stage needs at its peak, on a `cpu` or `cuda` device."""
    stages = {"rounding the embedding": Memory(2 * 4 * work.outer, 0)}
    if work.calibrated:
        passes, states = _passes_memory(work, device)
        stages |= {"a pass through a block": passes, "solving the largest linear": Memory(_solving_bytes(work), states)}
    else:
        stages["solving the largest linear"] = Memory(SOLVER_MATRICES * 4 * _largest(work), 0)
    if work.calibrated and work.recipe.tuned_sequences:
        stages["tuning"] = _tuning_memory(work)
    return {name: Memory(stage.device, stage.host + PROCESS_BYTES) for name, stage in stages.items()}


def peak(stages: dict[str, Memory]) -> Memory:
    """The most that any stage needs."""
    return Memory(max(stage.device for stage in stages.values()), max(stage.host for stage in stages.values()))


def memory_estimate(work: Work) -> int:
    """Bytes at the peak of a run on a CPU."""
    return max(stage.device + stage.host for stage in memory(work, "cpu").values())


def _largest(work: Work) -> int:
    return max((tensor.weights for tensor in work.block), default=0)


def _moments_bytes(work: Work) -> int:
    return sum(4 * columns**2 for columns in work.inputs(work.block))


def _passes_memory(work: Work, device: str) -> tuple[Memory, int]:
    """A block in float32, its second moments (a shard's and the total), what a batch leaves in it; before that, the
    embedding, and the output with a sequence's logits. On the host the sequences' hidden states, which are also
    returned; guided: of one shard, with gradients."""
    batch = max(work.recipe.sequence_length, BATCH_TOKENS if device == "cpu" else GPU_BATCH_TOKENS)
    batch = min(batch, work.tokens)
    inner = max((max(tensor.matrix) for tensor in work.block), default=0)
    activations = 4 * batch * (HIDDEN_STATES * work.hidden + INNER_STATES * inner)
    logits = 3 * 4 * work.recipe.sequence_length * int(work.config["vocab_size"]) if work.guided else 0
    block = 4 * sum(tensor.weights for tensor in work.block)
    states = 4 * work.hidden * (3 * -(-work.tokens // SHARDS) if work.guided else work.tokens)
    outer = 2 * 4 * work.outer + logits if work.guided else 4 * work.outer
    return Memory(max(block + 2 * _moments_bytes(work) + activations, outer), states), states


def _solving_bytes(work: Work) -> int:
    """The block's second moments, and the solver's arrays."""
    widest = max((tensor.matrix[1] for tensor in work.block), default=0)
    solver = SOLVER_MATRICES * 4 * _largest(work) + FACTOR_MATRICES * 8 * widest**2
    return _moments_bytes(work) + solver


def _tuning_memory(work: Work) -> Memory:
    """Both models' outputs and an embedding, a block with its gradients, a sequence's states at every depth, the
    tuned numbers, their gradients and Adam's moments. States and numbers grow with the depth of the model."""
    length, vocabulary = work.recipe.sequence_length, int(work.config["vocab_size"])
    block = 4 * 4 * sum(tensor.weights for tensor in work.block)
    states = 4 * length * work.hidden * (work.blocks + 1)
    device = 3 * 4 * work.outer + states + 4 * 4 * tuned_numbers(work) + max(block, 8 * 4 * length * vocabulary)
    return Memory(device, 4 * work.hidden * length * (work.recipe.tuned_sequences + HELD_OUT))


def tuned_numbers(work: Work) -> int:
    """How many stored floating-point numbers tuning moves."""
    vectors = sum(tensor.weights for tensor in work.tensors if len(tensor.shape) == 1)
    return vectors + sum(_grid_numbers(tensor.codec, *tensor.matrix) for tensor in work.linears)


@lru_cache
def _grid_numbers(name: str, rows: int, columns: int) -> int:
    """Of one linear: those of the grid that one row of zeros decodes to, for every row."""
    kind = codec(name)
    if not isinstance(kind, GridCodec):
        return 0
    planes = {plane: np.zeros(shape, dtype) for plane, (dtype, shape) in kind.layout(1, columns).items()}
    grid, _ = kind.unpack(planes, columns)
    parts = numbers(TensorGrid.of(grid, torch.device("cpu"))).values()
    return rows * sum(len(part.flatten()) for part in parts)


@dataclass(frozen=True)
class Disk:
    """Bytes.

    artifact    what the run leaves
    work        what it keeps beside that while it runs
    read        of the source, of its own work and, tuning, of the artifact, once for each time it goes through them
    written     artifact and work, once for each time they are written
    """

    artifact: int
    work: int
    read: int
    written: int


def disk(work: Work) -> Disk:
    """What a run from nothing keeps, reads and writes."""
    artifact, source = sum(tensor.nbytes for tensor in work.tensors), source_bytes(work)
    if not work.calibrated:
        return Disk(artifact, 0, source, artifact)
    states = 4 * work.tokens * work.hidden * work.blocks
    kept = states + 8 * work.tokens * work.hidden if work.guided else 0
    measured = work.blocks * _moments_bytes(work) if work.recipe.size or work.recipe.bits else 0
    tuned = work.recipe.tuned_sequences
    rereads = 2 * tuned + 2 * HELD_OUT if tuned else 0
    targets = 4 * work.hidden * work.recipe.sequence_length * (tuned + HELD_OUT) if tuned else 0
    through = 3 if work.guided else 2
    read = (through + bool(tuned)) * source + rereads * artifact + (3 * states if work.guided else 0) + measured
    written = artifact + (2 * states if work.guided else 0) + measured + targets
    return Disk(artifact, kept + measured + targets, read, written)


def source_bytes(work: Work) -> int:
    """Of the checkpoint, in the dtype that its config.json gives (float16 where none)."""
    name = str(work.config.get("dtype") or work.config.get("torch_dtype") or "float16")
    return (4 if name == "float32" else 2) * sum(tensor.weights for tensor in work.tensors)


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of a run.

    passes    matrix products of the forward and backward passes, in the recipe's `compute_dtype`
    moments   second moments, in float32
    factors   their Cholesky factors and inverses, in float64
    solver    error feedback and descent
    """

    passes: float = 0.0
    moments: float = 0.0
    factors: float = 0.0
    solver: float = 0.0

    @property
    def total(self) -> float:
        return self.passes + self.moments + self.factors + self.solver


def operations_estimate(work: Work) -> Operations:
    """What a run from nothing computes."""
    recipe, linears = work.recipe, work.linears
    if not work.calibrated:
        return Operations()
    attention = 4 * recipe.sequence_length * work.hidden * work.blocks
    forward = 2 * sum(tensor.weights for tensor in linears) + attention  # per token
    moments = sum(work.tokens * columns**2 for columns in work.inputs(linears))  # one half of the matrix
    factors = recipe.output_groups * sum(2 * tensor.matrix[1] ** 3 for tensor in linears)
    descent = sum(2 * recipe.descent * tensor.weights * tensor.matrix[1] for tensor in linears)
    solver = descent + sum(_codes(recipe, *tensor.matrix) for tensor in linears)
    return Operations(_passes(work) * work.tokens * forward + _tuning(work, forward), moments, factors, solver)


def _codes(recipe: Recipe, rows: int, columns: int) -> float:
    """Operations of finding a linear's codes by error feedback, or by the exact solver."""
    return rows * columns**3 / 3 if recipe.solver == "exact" else rows * columns**2


def _passes(work: Work) -> int:
    """Forward passes over the calibration tokens, a backward pass by the inputs alone counted as one."""
    if work.recipe.prefix == "quantized":
        return (1 + len(architecture_of(work.config).linears)) * (1 + work.recipe.asymmetric)
    return 3 if work.guided else 1


def _tuning(work: Work, forward: float) -> float:
    """Operations of end-to-end tuning: for each token a pass of the source, and one forward, again, and backward."""
    recipe = work.recipe
    if not recipe.tuned_sequences:
        return 0.0
    tokens, head = recipe.tuned_sequences * recipe.sequence_length, 2 * work.outer
    return tokens * (5 * forward + 4 * head) + 3 * HELD_OUT * recipe.sequence_length * (forward + head)


@dataclass(frozen=True)
class Rates:
    """Floating-point operations per second of large matrix products: float32, those of passes, float64."""

    float32: float
    passes: float
    float64: float


def seconds_estimate(work: Work, rates: Rates, threads: int) -> float:
    """Seconds of a run from nothing, the disk aside; `threads` fit grids and unpack weights on the host."""
    operations = operations_estimate(work)
    weights = sum(tensor.weights for tensor in work.tensors if len(tensor.shape) == 2)
    tuned = work.recipe.tuned_sequences if work.calibrated else 0
    unpacking = 2 * (tuned + HELD_OUT) * weights * UNPACK_SECONDS_PER_WEIGHT if tuned else 0.0
    host = weights * FIT_SECONDS_PER_WEIGHT / threads + unpacking
    solving = operations.solver / (SOLVER_SHARE * rates.float32)
    moments, factors = operations.moments / rates.float32, operations.factors / rates.float64
    return operations.passes / rates.passes + moments + factors + solving + host
