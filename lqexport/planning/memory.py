"""Estimates the peak memory of each stage of a run from shapes alone, and chooses the placement that fits.

The estimates count what the code allocates; `tests/test_cost.py` compares them with a measured run. The choice does not
change the result of a run (`lqexport.runtime.placement`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path

import psutil
import torch

from lqexport.arguments import taken
from lqexport.calibration.collect import BATCH_TOKENS, SHARDS
from lqexport.converters.models.tensor_names import expert_number
from lqexport.converters.plan import PlannedTensor
from lqexport.errors import check_least, with_advice
from lqexport.formats.codec import GridCodec, SectionedCodec, TrellisCodec
from lqexport.formats.registry import codec_named
from lqexport.grids.fit import minmax
from lqexport.planning.cost import Work, cross_bytes, largest_part_bytes
from lqexport.runtime.placement import Location, Placement, locations
from lqexport.runtime.tiles import ROW_TILE, whole_tiles
from lqexport.solver.cholesky import PANEL
from lqexport.tuning.tensor_cache import NUMBERS
from lqexport.tuning.tune import HELD_OUT
from lqexport.tuning.tuned_numbers import numbers

PROCESS_BYTES = 700_000_000
"""Bytes that Python with torch, transformers and numba takes before any model is read."""

SOLVER_MATRICES = 8
"""Number of float32 arrays of a linear's shape that the solver holds at once."""
FACTOR_PANELS = 3
"""Number of float64 panels [C, PANEL] that the Cholesky factorization works on, besides the panels that it keeps."""

ROTATED_SQUARES = 10
"""Matrices of a Hessian's size, counted in float32, that are held while a rotated Hessian is factorized: itself, its
root, the root's blocks over their diagonal, and a copy, all in float64; the damped Hessian and the result."""

HIDDEN_STATES, INNER_STATES = 14, 6
"""Float32 numbers that a block's backward pass keeps per token, in units of the hidden width and of the MLP's width."""
HELD_STATES = 4
"""Float32 numbers that a paused pass through a block holds per token besides the inputs of the linears that it has
paused at, in units of the hidden width."""
TUNED_MATRICES = 5
"""Number of float32 arrays of a tensor's shape that tuning holds while it computes the gradient of the grid's numbers
from that of the values."""


@dataclass(frozen=True)
class Memory:
    """Peak memory of a stage in bytes, on the device and on the host. A run on a CPU needs the sum."""

    device: int
    host: int

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.device + other.device, self.host + other.host)


PASSING, AIMING = "a pass through a block", "what the largest linear aims at"
SOLVING = "solving the largest linear"
"""Names of the stages whose memory depends on the placement."""


def memory(work: Work, placement: Placement) -> dict[str, Memory]:
    """Returns stage -> peak memory under a placement."""
    process = Memory(0, PROCESS_BYTES)
    stages = {"rounding the embedding": Memory(2 * 4 * max(work.outer, work.tables), 0) + process}
    stages |= _placed(work, placement)
    if work.calibrated and work.recipe.tuned_sequences:
        stages["tuning"] = _tuning_memory(work, placement) + _unpacked(work, placement) + process
    return stages


def _placed(work: Work, placement: Placement) -> dict[str, Memory]:
    """Returns stage -> peak memory, of the stages that the placement is chosen for."""
    if not work.calibrated:
        stages = {SOLVING: Memory(_chunk_bytes(work, placement), 0)}
    else:
        stages = {PASSING: _passing(work, placement)}
        if work.recipe.asymmetric:
            stages[AIMING] = _aiming(work, placement)
        stages[SOLVING] = _solving(work, placement)
    return {name: stage + Memory(0, PROCESS_BYTES) for name, stage in stages.items()}


def peak(stages: dict[str, Memory]) -> Memory:
    """Returns the largest memory that any stage needs, on the device and on the host."""
    return Memory(max(stage.device for stage in stages.values()), max(stage.host for stage in stages.values()))


def memory_estimate(work: Work, placement: Placement) -> int:
    """Returns the peak memory of a run on a CPU, in bytes."""
    return max(stage.device + stage.host for stage in memory(work, placement).values())


def _kept(location: Location, nbytes: int) -> Memory:
    """Returns the memory of `nbytes` at a location. Files count as none, since they use only memory that is free."""
    return Memory(nbytes if location.name == "device" else 0, nbytes if location.name == "host" else 0)


def _passing(work: Work, placement: Placement) -> Memory:
    """Returns the memory of a pass through a block.

    On the device: the block, the Hessian sums of one shard and the activations of a batch; or, where that is more, the
    embeddings, and the output with one sequence's logits, which are needed before; and the passes that are held while
    they are paused. At their locations: the total Hessian sums and the hidden states.
    """
    batch = min(max(work.recipe.sequence_length, BATCH_TOKENS), work.tokens)
    inner = max((max(tensor.matrix) for tensor in work.different), default=0)
    activations = 4 * batch * (HIDDEN_STATES * work.hidden + INNER_STATES * inner)
    logits = 3 * 4 * work.recipe.sequence_length * int(work.config["vocab_size"]) if work.guided else 0
    block = _blocks_bytes(work, placement)
    outer = 4 * (work.outer + max(work.tables, work.outer * work.guided)) + logits
    sums = _sums_bytes(work, placement)
    working = Memory(max(block + sums + activations, outer) + _held(work, placement), _kept_states(work, placement))
    return working + _kept(placement.moments, sums) + _states(work, placement)


def _aiming(work: Work, placement: Placement) -> Memory:
    """Returns the memory to compute the target of asymmetric calibration, after all shards have been added up.

    The Hessian is needed once if it is kept on the device; otherwise its two halves and their sum are copied there.
    Beside it: panels of its Cholesky factor, and arrays of a linear's shape, four in float32 and three in float64.
    """
    largest = _largest(work)
    copies = 1 if placement.moments.holds(placement.device) else 3
    arrays = copies * 4 * _widest(work) ** 2 + FACTOR_PANELS * _panel_bytes(work) + (4 * 4 + 3 * 8) * largest
    kept = _kept(placement.moments, _sums_bytes(work, placement)) + _kept_cholesky(work, placement)
    held = _held(work, placement)
    return Memory(_blocks_bytes(work, placement) + arrays + held, 0) + kept + _states(work, placement)


def _held(work: Work, placement: Placement) -> int:
    """Returns the bytes of the passes that are held while they are paused (`lqexport.calibration.paused`)."""
    return min(work.tokens, placement.held) * _held_bytes(work)


def _held_bytes(work: Work) -> int:
    """Returns the bytes that paused passes hold for each token, in one model or, if asymmetric, in two."""
    if work.recipe.prefix != "quantized":
        return 0
    return 4 * (1 + bool(work.recipe.asymmetric)) * (HELD_STATES * work.hidden + _widest(work))


def _sums_bytes(work: Work, placement: Placement) -> int:
    """Returns the bytes of the totals over all sequences.

    These are the Hessians of a block or of a part of it; with asymmetric calibration, the sums of a group of linears.
    """
    return cross_bytes(work) if work.recipe.asymmetric else largest_part_bytes(work, placement.parts)


def _widest(work: Work) -> int:
    """Returns the largest number of inputs of a linear."""
    return max((tensor.matrix[1] for tensor in work.different), default=0)


def _largest(work: Work) -> int:
    """Returns the number of weights of the largest linear."""
    return max((tensor.weights for tensor in work.different), default=0)


def _panel_bytes(work: Work) -> int:
    """Returns the bytes of one float64 panel of the widest linear's Cholesky factor."""
    return 8 * _widest(work) * min(PANEL, _widest(work))


def _kept_cholesky(work: Work, placement: Placement) -> Memory:
    """Returns the memory of all panels of the largest Cholesky factor, a float64 triangle."""
    return _kept(placement.cholesky, 4 * _widest(work) ** 2 + _panel_bytes(work) // 2)


def _blocks_bytes(work: Work, placement: Placement) -> int:
    """Returns the bytes of a block's linears in a pass; with asymmetric calibration, of both models' blocks."""
    return _weight_bytes(work, placement) * work.block_weights * (1 + bool(work.recipe.asymmetric))


def _weight_bytes(work: Work, placement: Placement) -> int:
    """Returns the bytes of one weight in a pass."""
    return 4 if work.recipe.compute_dtype_on(placement.device.type) == "float32" else 2


def _states(work: Work, placement: Placement) -> Memory:
    """Returns the memory of the hidden states that passes keep between blocks.

    A forward pass keeps those of all sequences; asymmetric calibration keeps them for two models. A guided pass keeps
    one shard's on the host, with gradients.
    """
    if work.guided and work.recipe.prefix == "full":
        return Memory(0, 3 * 4 * work.states * -(-work.tokens // SHARDS))
    return _kept(placement.hidden, _states_bytes(work))


def _states_bytes(work: Work) -> int:
    """Returns the bytes of the hidden states of all sequences at one depth, in one model or, if asymmetric, in two."""
    return 4 * (1 + bool(work.recipe.asymmetric)) * work.states * work.tokens


def _kept_states(work: Work, placement: Placement) -> int:
    """Returns the bytes of all blocks' inputs and of one gradient, where a guided pass keeps them in memory; else 0."""
    return _all_states_bytes(work) if placement.states else 0


def _all_states_bytes(work: Work) -> int:
    return 4 * work.states * work.tokens * (work.blocks + 2) if work.guided else 0


def _solving(work: Work, placement: Placement) -> Memory:
    """Returns the memory to solve the largest linear.

    It holds the block's Hessians; a copy of one linear's Hessian, and for the descent a damped one; its Cholesky
    factor; and the solver's arrays. On the host: the packed tensor that is being written, and the next one.
    """
    square = 4 * _widest(work) ** 2
    arrays = max(FACTOR_PANELS * _panel_bytes(work), square * bool(work.recipe.sweeps) + _chunk_bytes(work, placement))
    copied = square if work.recipe.asymmetric or not placement.moments.holds(placement.device) else 0
    working = Memory(copied + arrays + _whole_squares(work) * square + _correction_bytes(work), 0)
    if work.recipe.prefix == "quantized":  # the passes go on with the block afterwards
        working += Memory(_blocks_bytes(work, placement) + _held(work, placement), 0)
    guided = work.guided and work.recipe.prefix == "full"
    states = Memory(0, _kept_states(work, placement)) if guided else _states(work, placement)
    working += Memory(0, 2 * max((tensor.nbytes for tensor in work.different), default=0))
    return working + states + _kept(placement.moments, _sums_bytes(work, placement)) + _kept_cholesky(work, placement)


def _whole_squares(work: Work) -> int:
    """Returns how many further matrices of a Hessian's size the solver holds where all rows are solved at once; else 0.

    EXL2 and GPTQ's layout reorder the Hessian's columns. EXL3 rotates it, and factorizes it in float64.
    """
    codecs = [codec_named(tensor.codec_name) for tensor in work.different]
    if any(isinstance(codec, TrellisCodec) for codec in codecs):
        return ROTATED_SQUARES
    return 3 * any(isinstance(codec, SectionedCodec) for codec in codecs)


def _chunk_bytes(work: Work, placement: Placement) -> int:
    """Returns the bytes of the solver's arrays for the rows that are solved at once."""
    whole = bool(_whole_squares(work))
    matrices = [tensor.matrix for tensor in work.different]
    most = max(((rows if whole else min(placement.rows, rows)) * columns for rows, columns in matrices), default=0)
    return SOLVER_MATRICES * 4 * most


def _correction_bytes(work: Work) -> int:
    """Returns the bytes of a low-rank correction's float64 arrays: two of the error, one of its columns' weights."""
    if not work.recipe.rank:
        return 0
    return max((8 * (2 * tensor.weights + tensor.matrix[1] ** 2) for tensor in work.different), default=0)


def placements(work: Work, device: torch.device, folder: Path) -> Iterator[Placement]:
    """Yields placements, faster ones first: each keeps less on the device, and then less on the host.

    `folder` is for files, where the host has no room.
    """
    kept = locations(device, folder)
    most = max((whole_tiles(tensor.matrix[0] + ROW_TILE - 1) for tensor in work.different), default=ROW_TILE)
    for moments in range(len(kept)):
        hidden = kept[max(moments, len(kept) - 2)]  # on the host, unless even Hessians have to be in files
        for parts, factors in product(_parts(work), sorted({max(0, moments - 1), moments})):
            for rows in _chunks(most):
                yield Placement(device, kept[moments], kept[factors], rows, parts, hidden, held=0)


def _chunks(rows: int) -> Iterator[int]:
    """Yields numbers of rows, each half of the one before, down to one tile."""
    while rows > ROW_TILE:
        yield rows
        rows = whole_tiles(rows // 2)
    yield ROW_TILE


def _parts(work: Work) -> list[int]:
    """Returns the numbers of parts into which a block's experts may be divided.

    Another pass for each part costs less than keeping Hessians at a slower location. It is possible only if the inputs
    are those of the full-precision model.
    """
    experts = len({number for tensor in work.block if (number := expert_number(tensor.name)) is not None})
    if work.recipe.prefix != "full" or experts < 2:
        return [1]
    return [*(1 << power for power in range((experts - 1).bit_length())), experts]


@dataclass(frozen=True)
class MemoryLimits:
    """Bytes that a run may use on the device (if it is a GPU) and on the host. None means no limit.

    Raises UserError for what is no number of bytes.
    """

    device: int | None = None
    host: int | None = None

    def __post_init__(self) -> None:
        with with_advice("Memory is given in bytes, such as 24 * 10**9."):
            for name in ("device", "host"):
                object.__setattr__(self, name, taken(name, getattr(self, name), "int | None"))
            check_least(0, device=self.device, host=self.host)

    def shared(self, processes: int) -> MemoryLimits:
        """Returns the limits of each of `processes` processes, which share the host's memory and have a GPU each."""
        return MemoryLimits(self.device, self.host and self.host // processes)

    def excess(self, stage: Memory, device: torch.device) -> list[tuple[str, int, int]]:
        """Returns (`device` or `host`, bytes needed, limit) for every limit that a stage exceeds."""
        if device.type == "cpu":
            pairs = [("host", stage.device + stage.host, self.host)]
        else:
            pairs = [("device", stage.device, self.device), ("host", stage.host, self.host)]
        return [(name, nbytes, limit) for name, nbytes, limit in pairs if limit is not None and nbytes > limit]


def available(device: torch.device) -> MemoryLimits:
    """Returns the memory that is free now."""
    return MemoryLimits(
        torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None, psutil.virtual_memory().available
    )


def choose_placement(work: Work, device: torch.device, folder: Path, limits: MemoryLimits) -> Placement:
    """Returns the fastest placement that fits into the limits; the one that needs the least if none fits.

    `folder` is for files, where the host has no room.
    """
    for placement in placements(work, device, folder):
        needed = list(_placed(work, placement).values())
        if not any(limits.excess(stage, device) for stage in needed):
            break
    if work.calibrated and (bytes_per_token := _held_bytes(work)):
        free = min(_half(*each) for each in _taken(needed, device, limits))
        placement = replace(placement, held=min(work.tokens, free // bytes_per_token))
    if device.type == "cpu":  # its passes take so long that the time for disk and codecs does not matter
        return placement
    stages = memory(work, placement)
    passing, tuning = _passing(work, placement), _tuning_memory(work, placement)
    if _states_bytes(work) <= _half(limits.device, max(stage.device for stage in stages.values())):
        placement = replace(placement, hidden=locations(device, folder)[0])
    states = _all_states_bytes(work) <= _half(limits.host, passing.host)
    return replace(
        placement, states=states, unpacked=(_half(limits.device, tuning.device), _half(limits.host, tuning.host))
    )


def _taken(stages: list[Memory], device: torch.device, limits: MemoryLimits) -> list[tuple[int | None, int]]:
    """Returns (limit, bytes taken) of the memory in which the device computes, for each stage."""
    if device.type == "cpu":
        return [(limits.host, stage.device + stage.host) for stage in stages]
    return [(limits.device, stage.device) for stage in stages]


def _half(limit: int | None, taken: int) -> int:
    """Returns half of the bytes that a stage and the process leave free; a huge number if there is no limit."""
    return 1 << 62 if limit is None else max(0, limit - taken - PROCESS_BYTES) // 2


def _unpacked(work: Work, placement: Placement) -> Memory:
    """Returns the memory of the tensors that tuning keeps unpacked."""
    needed = int(sum(_code_bytes(tensor) * tensor.weights for tensor in work.linears))
    device = min(needed, placement.unpacked[0])
    return Memory(device, min(needed - device, placement.unpacked[1]))


def _code_bytes(tensor: PlannedTensor) -> float:
    """Returns the bytes of a weight's code and its share of the grid while a linear is kept unpacked, at most."""
    return 2 if isinstance(codec_named(tensor.codec_name), TrellisCodec) else 1 + NUMBERS


def placement_sentence(placement: Placement) -> str:
    """Returns a sentence that describes a placement."""
    parts = (
        f" A block's experts are solved in {placement.parts} parts, with a pass for each."
        if placement.parts > 1
        else ""
    )
    return (
        f"Second moments are kept on the {placement.moments.name}, factors on the {placement.cholesky.name}, and up to "
        f"{placement.rows} rows of a linear are solved at once.{parts}"
    )


def _tuning_memory(work: Work, placement: Placement) -> Memory:
    """Returns the memory of end-to-end tuning, without the tensors that stay unpacked.

    On the device: both models' output matrices; a block with its codes and the arrays of the backward pass through its
    largest tensor, or, where that is more, one sequence's logits. On the host: the tuned numbers, their gradients and
    Adam's two moments; one sequence's hidden states at every depth; and the first and last hidden states of every
    sequence.
    """
    length, vocabulary = work.recipe.sequence_length, int(work.config["vocab_size"])
    block = (1 + _weight_bytes(work, placement)) * work.block_weights
    largest = _largest(work)
    device = 2 * 4 * work.outer + max(block + TUNED_MATRICES * 4 * largest, 8 * 4 * length * vocabulary)
    states = 4 * length * work.states * (work.blocks + 1 + 2 * (work.recipe.tuned_sequences + HELD_OUT))
    return Memory(device, states + 4 * 4 * tuned_numbers(work))


def tuned_numbers(work: Work) -> int:
    """Returns how many stored floating-point numbers tuning changes."""
    vectors = sum(tensor.weights for tensor in work.tensors if len(tensor.shape) == 1)
    return vectors + sum(_grid_numbers(tensor.codec_name, *tensor.matrix) for tensor in work.linears)


@lru_cache
def _grid_numbers(codec_name: str, rows: int, columns: int) -> int:
    """Returns the number of floating-point numbers that the grids of a linear's rows are made of."""
    codec = codec_named(codec_name)
    if isinstance(codec, TrellisCodec):
        return rows + columns
    if not isinstance(codec, GridCodec):
        return 0
    arrays = numbers(minmax(codec, torch.ones(1, columns))).values()
    return rows * sum(len(array.flatten()) for array in arrays)
