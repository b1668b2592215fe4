"""Estimates what a run costs, from shapes alone: disk space, bytes moved, operations and seconds.

The estimates count what the code reads and multiplies. The constants for seconds and for the solver's rate were
measured on a CPU; no GPU has been timed. Memory is estimated in `lqexport.planning.memory`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from lqexport.calibration.asymmetric import STRENGTH_ROWS
from lqexport.calibration.experts import parts as parts_of
from lqexport.calibration.experts import pooled, sees_hidden_states
from lqexport.calibration.moments import Group
from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.architectures import architecture_of, normalized
from lqexport.converters.models.tensor_names import block_module, expert_number, of_each_expert
from lqexport.converters.plan import PlannedTensor
from lqexport.formats.registry import family_of
from lqexport.models.smoothing import SEQUENCES
from lqexport.recipe import Recipe
from lqexport.tuning.tune import HELD_OUT

FIT_SECONDS_PER_WEIGHT = 0.2e-6
"""Seconds to fit the grid of one weight on one core. The fit is bound by memory and branches, not by the rate of matrix
products."""

UNPACK_SECONDS_PER_WEIGHT = 2e-9
"""Seconds to unpack one stored weight on one core: 0.5 (Q4_K) to 2 (Q3_K) ns. Tuning unpacks again at every step."""

SEARCH_SECONDS = {
    "gguf:IQ3_XXS": (0.6e-6, 0.25e-6),
    "gguf:IQ3_S": (0.5e-6, 0.22e-6),
    "gguf:IQ2_XXS": (0.4e-6, 0.2e-6),
    "gguf:IQ2_XS": (0.4e-6, 0.2e-6),
    "gguf:IQ2_S": (0.4e-6, 0.21e-6),
    "gguf:IQ1_S": (0.6e-6, 0.15e-6),
    "gguf:IQ1_M": (0.6e-6, 0.24e-6),
}
"""Seconds to search a codebook for one weight on one core: in the fit with error feedback, and in a sweep of descent.

Measured on linears of `bench/vectors.py`, in excess of Q4_K's times. Nobody has timed the CUDA kernels, so the host's
time is counted whatever the device."""

TRELLIS_SECONDS = (0.75e-5, 0.5e-5)
"""The same for the walks of EXL3, in any number of bits: 1.6 to 2.8 ms for a tile of 256 weights, and two thirds of
that in a sweep (bench/exl3_speed.py)."""

SOLVER_SHARE = 0.22
"""Rate of error feedback and descent, relative to that of large matrix products. Both go column by column. Measured on
linears of 4096 x 14336 on one core (docs/scale.md)."""


@dataclass(frozen=True)
class Work:
    """The facts that the estimates are computed from.

    They are a recipe, the model's config.json, and every tensor that will be stored.

    `recipe` must have nothing left open (`defaults.settled`).
    """

    recipe: Recipe
    config: dict[str, Any]
    tensors: list[PlannedTensor]

    @cached_property
    def architecture(self) -> Architecture:
        return architecture_of(self.config)

    @cached_property
    def linears(self) -> list[PlannedTensor]:
        """The linears of all decoder blocks."""
        prefix = f"{self.architecture.blocks}."
        return [tensor for tensor in self.tensors if tensor.linear and tensor.name.startswith(prefix)]

    @cached_property
    def block(self) -> list[PlannedTensor]:
        """The linears of the decoder block that has the most weights."""
        prefix = self._largest_block
        return [tensor for tensor in self.linears if tensor.name.startswith(prefix)]

    @cached_property
    def block_weights(self) -> int:
        """Number of weights of the linears of `block`."""
        return sum(tensor.weights for tensor in self.block)

    @cached_property
    def different(self) -> list[PlannedTensor]:
        """One linear of `block` for each shape and codec. The experts of a block are many and alike."""
        return list({(tensor.shape, tensor.codec_name): tensor for tensor in self.block}.values())

    @cached_property
    def _largest_block(self) -> str:
        """The prefix of the names of the tensors in that block."""
        weights: Counter[str] = Counter()
        for tensor in self.linears:
            index = tensor.name.removeprefix(f"{self.architecture.blocks}.").partition(".")[0]
            weights[f"{self.architecture.blocks}.{index}."] += tensor.weights
        return max(weights, key=weights.__getitem__, default=f"{self.architecture.blocks}.0.")

    def in_block(self, tensor: PlannedTensor) -> str:
        """Returns the name that a linear of `block` has within the block, without `.weight`."""
        return tensor.name.removeprefix(self._largest_block).removesuffix(".weight")

    @property
    def blocks(self) -> int:
        """Number of decoder blocks."""
        return int(self.config["num_hidden_layers"])

    @property
    def hidden(self) -> int:
        """Width of the hidden states."""
        return int(self.config["hidden_size"])

    @property
    def states(self) -> int:
        """Largest width of the states that are kept between blocks: hidden states and what is carried with them."""
        return self.hidden + self.architecture.carried(self.config)

    @property
    def tokens(self) -> int:
        """Number of calibration tokens."""
        return self.recipe.samples * self.recipe.sequence_length

    @property
    def outer(self) -> int:
        """Number of weights of the embedding; the output has as many."""
        return int(self.config["vocab_size"]) * self.hidden

    @cached_property
    def tables(self) -> int:
        """Number of weights of the further tables of which a token needs one row."""
        return sum(tensor.weights for tensor in self.tensors if tensor.name in self.architecture.tables)

    @property
    def calibrated(self) -> bool:
        """Whether the run needs calibration sequences."""
        return any(tensor.linear for tensor in self.tensors) and self.recipe.calibrates

    @property
    def guided(self) -> bool:
        """Whether the run collects guided second moments."""
        return self.recipe.moments == "guided"

    def inputs(self, tensors: Iterable[PlannedTensor]) -> list[PlannedTensor]:
        """Returns the linears for which a Hessian is kept.

        Linears that share their inputs share a Hessian. Guided moments keep one for each linear and output group, so a
        linear is in the list once for each output group.
        """
        if self.guided:
            return list(tensors) * self.recipe.output_groups
        firsts = tuple(f".{group[0]}.weight" for group in self.architecture.linears)
        return [tensor for tensor in tensors if tensor.name.endswith(firsts)]

    @cached_property
    def groups(self) -> list[list[PlannedTensor]]:
        """The linears of `block`, grouped by the inputs that they share, in the order in which data flows."""
        named = {tensor.name: tensor for tensor in self.block}
        groups = ([f"{self._largest_block}{linear}.weight" for linear in group] for group in self.architecture.linears)
        return [[named[name] for name in group if name in named] for group in groups]

    @cached_property
    def measured(self) -> dict[Group, PlannedTensor]:
        """The linears of `block` for which a Hessian is kept, each as a group of its own."""
        return {(self.in_block(tensor),): tensor for tensor in self.inputs(self.block)}

    @cached_property
    def pools(self) -> list[PlannedTensor]:
        """One linear for each average Hessian over all experts."""
        return [
            self.measured[(first,)] for first, *_ in pooled(self.measured, self.measured, self.architecture).values()
        ]

    def added(self, tensor: PlannedTensor) -> int:
        """Returns the number of the linear's rows whose outputs are added to the hidden states, else 0.

        For these rows asymmetric calibration also corrects the hidden states. With plain moments it does not.
        """
        ends = tuple(f".{linear}.weight" for linear in self.architecture.adders if linear)
        return tensor.matrix[0] if ends and tensor.name.endswith(ends) and self.recipe.moments != "plain" else 0

    def is_pooled(self, tensor: PlannedTensor) -> bool:
        """Returns whether a linear's Hessian is also added to the average over all experts."""
        module = block_module(self.architecture, tensor.name)
        return module is not None and sees_hidden_states(of_each_expert(module[1]), self.architecture)

    def share(self, tensor: PlannedTensor) -> float:
        """Returns the share of tokens that go through a linear: 1, or for an expert the mean share routed to it."""
        return 1.0 if expert_number(tensor.name) is None else self._routed

    @cached_property
    def _routed(self) -> float:
        config, count = normalized(self.config), self.architecture.experts
        assert count is not None
        return float(config["num_experts_per_tok"] / config[count])


def cross_bytes(work: Work) -> int:
    """Returns the bytes of asymmetric calibration's sums, for the group of linears that has the largest."""
    sums = [
        [4 * 2 * (2 * t.matrix[1] + work.added(t)) * t.matrix[1] for t in work.inputs(group)] for group in work.groups
    ]
    return max(map(sum, sums), default=0) if work.recipe.asymmetric else 0


def moments_bytes(work: Work) -> int:
    """Returns the bytes of the Hessians of the largest block, in float32."""
    return _squares(work.inputs(work.block))


def largest_part_bytes(work: Work, count: int) -> int:
    """Returns the bytes of Hessians of the largest of `count` parts of a block (`experts.parts`), with the average ones
    over all experts."""
    named = work.measured
    largest = max((_squares(named[group] for group in part) for part in parts_of(list(named), count)), default=0)
    return work.recipe.output_groups * (largest + _squares(work.pools))


def _squares(tensors: Iterable[PlannedTensor]) -> int:
    return sum(4 * tensor.matrix[1] ** 2 for tensor in tensors)


@dataclass(frozen=True)
class Disk:
    """Disk space and traffic of a run, in bytes.

    artifact    bytes of the finished artifact
    work        bytes of temporary files while the run goes on
    read        bytes read of the source, of temporary files and, when tuning, of the artifact, counted at each reading
    written     bytes written to the artifact and to temporary files, counted at each writing
    """

    artifact: int
    work: int
    read: int
    written: int


def disk(work: Work, parts: int = 1) -> Disk:
    """Returns what a run from the beginning keeps, reads and writes, with a block's experts in `parts` parts."""
    artifact, source = sum(tensor.nbytes for tensor in work.tensors), source_bytes(work)
    if not work.calibrated:
        return Disk(artifact, 0, source, artifact)
    states = 4 * work.tokens * work.states * work.blocks
    kept = states + 8 * work.tokens * work.states if work.guided else 0
    if work.recipe.prefix == "quantized":  # the inputs of one block while those of the next one are written
        kept += 8 * work.tokens * work.states * (1 + bool(work.recipe.asymmetric))
    measured = work.blocks * moments_bytes(work) if work.recipe.size or work.recipe.bits else 0
    tuned = work.recipe.tuned_sequences
    rereads = 2 * tuned + 2 * HELD_OUT if tuned else 0
    targets = 4 * work.hidden * work.recipe.sequence_length * (tuned + HELD_OUT) if tuned else 0
    # The source is read once more for each of: smoothing, solving, measuring types, tuning.
    again = _again(work, parts, [tensor.weights for tensor in work.linears])
    through = source_passes(work) + again + bool(work.recipe.smooth) + 1 + bool(measured) + bool(tuned)
    passed = (3 + 2 * again) * states if work.guided else 0
    read = round(through * source + rereads * artifact + passed + measured)
    written = artifact + (2 * states if work.guided else 0) + measured + targets
    return Disk(artifact, kept + measured + targets, read, written)


def source_passes(work: Work) -> int:
    """Returns how often the passes of calibration read the source.

    Guided moments read it forward and backward. A quantized prefix reads it once more, or twice where asymmetric
    calibration runs two models.
    """
    if work.recipe.prefix == "full":
        return 2 if work.guided else 1
    return 1 + bool(work.recipe.asymmetric) + 2 * work.guided


def source_bytes(work: Work) -> int:
    """Returns the bytes of the checkpoint, in the dtype that its config.json gives (float16 if it gives none)."""
    name = str(work.config.get("dtype") or work.config.get("torch_dtype") or "float16")
    return (4 if name == "float32" else 2) * sum(tensor.weights for tensor in work.tensors)


@dataclass(frozen=True)
class Operations:
    """Number of floating-point operations of a run.

    passes    matrix products of the forward and backward passes, in the recipe's `compute_dtype`
    moments   Hessians, in float32
    factors   Cholesky factors of the Hessians, and their inverses, in float64
    targets   targets of asymmetric calibration: products with sums and Cholesky factors, in float32
    solver    error feedback and descent
    """

    passes: float = 0.0
    moments: float = 0.0
    factors: float = 0.0
    targets: float = 0.0
    solver: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all operations."""
        return self.passes + self.moments + self.factors + self.targets + self.solver


def operations_estimate(work: Work, parts: int = 1, held: int = 1 << 62) -> Operations:
    """Returns the operations of a run from the beginning.

    parts   in how many parts a block's experts are solved
    held    tokens whose passes can be held while they are paused
    """
    recipe, linears = work.recipe, work.linears
    if not work.calibrated:
        return Operations()
    forward, moments, targets = forward_operations(work), moments_operations(work), 0.0
    # The Cholesky factor and its inverse, C^3 / 3 operations each.
    factors = sum(2 * tensor.matrix[1] ** 3 / 3 for tensor in work.inputs(linears))
    if recipe.asymmetric:
        # A triangle and a whole matrix. Then the target: a product with the sums and two with the triangular factor;
        # and the same from each half of the batches for a sample of rows, with the error on the other half.
        moments = 3 * moments + 2 * work.tokens * sum(work.added(tensor) * tensor.matrix[1] for tensor in linears)
        sampled = [(min(rows, STRENGTH_ROWS), rows, columns) for rows, columns in (each.matrix for each in linears)]
        targets = sum((4 * rows + 12 * sample) * columns**2 for sample, rows, columns in sampled)
    descent = sum(2 * recipe.sweeps * tensor.weights * tensor.matrix[1] for tensor in linears)
    solver = descent + sum(_codes(recipe, *tensor.matrix) for tensor in linears)
    sized = min(SEQUENCES, recipe.samples) * recipe.sequence_length * bool(recipe.smooth)
    passed = (passes(work, parts, held) * work.tokens + sized) * forward + _tuning(work, forward)
    return Operations(passed, moments, factors, targets, solver)


def forward_operations(work: Work) -> float:
    """Returns the operations of a forward pass through all blocks for one token."""
    attention = 4 * work.recipe.sequence_length * work.hidden * work.blocks
    return 2 * sum(work.share(tensor) * tensor.weights for tensor in work.linears) + attention


def moments_operations(work: Work) -> float:
    """Returns the operations of the sums of all Hessians over the calibration tokens."""
    # A Hessian of an expert that sees hidden states counts twice: for itself, and for the average over experts.
    counted = [tensor for tensor in work.inputs(work.linears) for _ in range(1 + work.is_pooled(tensor))]
    # Only one triangle of the symmetric matrix.
    return work.tokens * sum(work.share(tensor) * tensor.matrix[1] ** 2 for tensor in counted)


def _codes(recipe: Recipe, rows: int, columns: int) -> float:
    """Returns the operations that find a linear's codes by error feedback, or by the exact solver."""
    return rows * columns**3 / 3 if recipe.solver == "exact" else rows * columns**2


def passes(work: Work, parts: int = 1, held: int = 1 << 62) -> float:
    """Returns the number of passes over the calibration tokens, in units of a forward pass.

    A backward pass for the inputs' gradient alone counts as one forward pass. A block with experts runs again for each
    part. With a quantized prefix there is one pass, or two if asymmetric calibration runs two models. Tokens beyond
    `held` run through a block up to each group of linears and then whole.
    """
    if work.recipe.prefix == "full":
        again = _again(work, parts, [work.share(tensor) * tensor.weights for tensor in work.linears])
        return 1 + 2 * (1 + again) if work.guided else 1 + again
    sizes = [sum(tensor.weights for tensor in group) for group in work.groups]
    again = 1 - min(1.0, held / max(1, work.tokens))
    runs = 1 + again * sum(accumulate(sizes[:-1])) / max(1, sum(sizes))
    return runs * (1 + bool(work.recipe.asymmetric)) + 3 * work.guided


def _again(work: Work, parts: int, weights: list[float]) -> float:
    """Returns how many passes through all blocks are added because experts are divided into `parts` parts.

    `weights` are the costs of the linears in a pass. Guided passes leave out the experts of other parts. Leading blocks
    have no experts.
    """
    pairs = zip(weights, work.linears, strict=True)
    experts = sum(weight for weight, tensor in pairs if expert_number(tensor.name) is not None)
    share = experts / sum(weights) if work.guided and work.architecture.adds else 0.0
    return (parts - 1) * (1 - share + share / parts) * (1 - work.architecture.leading / work.blocks)


def _tuning(work: Work, forward: float) -> float:
    """Returns the operations of end-to-end tuning.

    For each token these are a forward pass of the source, and a forward pass, its recomputation and a backward pass of
    the quantized model.
    """
    recipe = work.recipe
    if not recipe.tuned_sequences:
        return 0.0
    tokens, head = recipe.tuned_sequences * recipe.sequence_length, 2 * work.outer
    return tokens * (5 * forward + 4 * head) + 3 * HELD_OUT * recipe.sequence_length * (forward + head)


@dataclass(frozen=True)
class Rates:
    """Floating-point operations per second of large matrix products, by dtype.

    float32   in float32
    passes    in the recipe's `compute_dtype`
    float64   in float64
    """

    float32: float
    passes: float
    float64: float


def search_seconds(work: Work) -> float:
    """Returns the seconds of one core that searches of codebooks and of walks take, for all linears and the output."""
    if not work.calibrated:
        return 0.0
    sweeps = work.recipe.sweeps
    of_types = [(tensor.weights, _searching(tensor.codec_name)) for tensor in work.tensors if tensor.linear]
    return sum(weights * (once + sweeps * each) for weights, (once, each) in of_types)


def _searching(codec_name: str) -> tuple[float, float]:
    """Returns the seconds to search for one weight, in the fit with error feedback and in a sweep of descent."""
    return TRELLIS_SECONDS if family_of(codec_name) == "exl3" else SEARCH_SECONDS.get(codec_name, (0.0, 0.0))


def seconds_estimate(work: Work, rates: Rates, threads: int, parts: int = 1, held: int = 1 << 62) -> float:
    """Returns the seconds of a run from the beginning, without waiting for the disk.

    `threads` CPU threads fit grids and unpack weights; `parts` and `held` as in `operations_estimate`.
    """
    operations = operations_estimate(work, parts, held)
    weights = sum(tensor.weights for tensor in work.tensors if len(tensor.shape) == 2)
    tuned = work.recipe.tuned_sequences if work.calibrated else 0
    unpacking = 2 * (tuned + HELD_OUT) * weights * UNPACK_SECONDS_PER_WEIGHT if tuned else 0.0
    host = (weights * FIT_SECONDS_PER_WEIGHT + search_seconds(work)) / threads + unpacking
    solving = operations.solver / (SOLVER_SHARE * rates.float32)
    singles, doubles = (operations.moments + operations.targets) / rates.float32, operations.factors / rates.float64
    return operations.passes / rates.passes + singles + doubles + solving + host


def shared_seconds(work: Work, rates: Rates) -> float:
    """Returns those seconds of `seconds_estimate` that pass once for several runs with the same second moments.

    These are the passes of the full-precision model and, where the linears are solved with them, the sums of the second
    moments. Other runs find their results in a cache (`quantize --cache`).
    """
    if not work.calibrated:
        return 0.0
    through, moments = 3.0 * work.guided, 0.0
    if work.recipe.prefix == "full":
        through, moments = passes(work), moments_operations(work)
    return through * work.tokens * forward_operations(work) / rates.passes + moments / rates.float32
