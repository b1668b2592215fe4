"""What each stage of a run needs at its peak, from shapes alone, and the way to run that fits what there is.

Computed from what the code allocates, by counting; `tests/test_cost.py` compares it with a measured run. Whatever is
chosen, the same bytes come out: see `lqexport.runtime.placement`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path

import psutil
import torch

from lqexport.calibration.collect import BATCH_TOKENS, SHARDS
from lqexport.converters.models.tensor_names import expert_number
from lqexport.formats.codec import GridCodec, SectionedCodec
from lqexport.formats.registry import codec_named
from lqexport.grids.fit import minmax
from lqexport.planning.cost import Work, cross_bytes, largest_part_bytes
from lqexport.runtime.placement import Location, Placement, locations
from lqexport.runtime.tiles import ROW_TILE, whole_tiles
from lqexport.solver.cholesky import PANEL
from lqexport.tuning.tensor_cache import NUMBERS
from lqexport.tuning.tune import HELD_OUT, numbers

PROCESS_BYTES = 700_000_000
"""What Python with torch, transformers and numba takes before any model is read."""

SOLVER_MATRICES = 8
"""Float32 arrays of a linear's own shape that solving it holds at once."""
FACTOR_PANELS = 3
"""Float64 panels [C, PANEL] that the factorization of its second moments computes with, besides those that it keeps."""

HIDDEN_STATES, INNER_STATES = 14, 6
"""Float32 numbers a token that a block's backward pass keeps: so many times the hidden and the MLP's width."""
TUNED_MATRICES = 5
"""Float32 arrays of a tensor's shape between the gradient by its values and that by its numbers."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a stage, on the device and on the host; a CPU run needs the sum."""

    device: int
    host: int

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.device + other.device, self.host + other.host)


PASSING, AIMING = "a pass through a block", "what the largest linear aims at"
SOLVING = "solving the largest linear"
"""Stages whose memory a run's room decides."""


def memory(work: Work, placement: Placement) -> dict[str, Memory]:
    """What each stage needs at its peak in a room."""
    stages = {"rounding the embedding": Memory(2 * 4 * work.outer, 0)}
    if work.calibrated:
        stages[PASSING] = _passing(work, placement)
        if work.recipe.asymmetric:
            stages[AIMING] = _aiming(work, placement)
        stages[SOLVING] = _solving(work, placement)
    else:
        stages[SOLVING] = Memory(_chunk_bytes(work, placement), 0)
    if work.calibrated and work.recipe.tuned_sequences:
        stages["tuning"] = _tuning_memory(work, placement) + _unpacked(work, placement)
    return {name: stage + Memory(0, PROCESS_BYTES) for name, stage in stages.items()}


def peak(stages: dict[str, Memory]) -> Memory:
    """The most that any stage needs."""
    return Memory(max(stage.device for stage in stages.values()), max(stage.host for stage in stages.values()))


def memory_estimate(work: Work, placement: Placement) -> int:
    """Bytes at the peak of a run on a CPU."""
    return max(stage.device + stage.host for stage in memory(work, placement).values())


def _kept(place: Location, count: int) -> Memory:
    """So many bytes in a place. Those of a file take memory only where it is free."""
    return Memory(count if place.name == "device" else 0, count if place.name == "host" else 0)


def _passing(work: Work, placement: Placement) -> Memory:
    """A block, the sums of a shard's second moments, and what a batch leaves in the block; before that, the
    embedding, and the output with a sequence's logits. Where they are kept, the totals and hidden states."""
    batch = min(max(work.recipe.sequence_length, BATCH_TOKENS), work.tokens)
    inner = max((max(tensor.matrix) for tensor in work.block), default=0)
    activations = 4 * batch * (HIDDEN_STATES * work.hidden + INNER_STATES * inner)
    logits = 3 * 4 * work.recipe.sequence_length * int(work.config["vocab_size"]) if work.guided else 0
    block = _blocks_bytes(work, placement)
    outer = 2 * 4 * work.outer + logits if work.guided else 4 * work.outer
    sums = _sums_bytes(work, placement)
    here = Memory(max(block + sums + activations, outer), _kept_states(work, placement))
    return here + _kept(placement.moments, sums) + _states(work, placement)


def _aiming(work: Work, placement: Placement) -> Memory:
    """When all shards of asymmetric calibration have been added up, what solves for the target: second moments, or two
    halves of them and their sum, panels of their factor, and arrays of a linear's shape, four in float32 and three in
    float64."""
    largest = _largest(work)
    copies = 1 if placement.moments.holds(placement.device) else 3
    arrays = copies * 4 * _widest(work) ** 2 + FACTOR_PANELS * _panel_bytes(work) + (4 * 4 + 3 * 8) * largest
    kept = _kept(placement.moments, _sums_bytes(work, placement)) + _kept_factor(work, placement)
    return Memory(_blocks_bytes(work, placement) + arrays, 0) + kept + _states(work, placement)


def _sums_bytes(work: Work, placement: Placement) -> int:
    """Totals over the sequences: second moments of a block or a part of it, or asymmetric those of a group of
    linears."""
    return cross_bytes(work) if work.recipe.asymmetric else largest_part_bytes(work, placement.parts)


def _widest(work: Work) -> int:
    return max((tensor.matrix[1] for tensor in work.block), default=0)


def _largest(work: Work) -> int:
    return max((tensor.weights for tensor in work.block), default=0)


def _panel_bytes(work: Work) -> int:
    return 8 * _widest(work) * min(PANEL, _widest(work))


def _kept_factor(work: Work, placement: Placement) -> Memory:
    """All panels of the largest, a triangle of float64."""
    return _kept(placement.factors, 4 * _widest(work) ** 2 + _panel_bytes(work) // 2)


def _blocks_bytes(work: Work, placement: Placement) -> int:
    """A block, asymmetric of two models."""
    return (
        _weight_bytes(work, placement)
        * sum(tensor.weights for tensor in work.block)
        * (1 + bool(work.recipe.asymmetric))
    )


def _weight_bytes(work: Work, placement: Placement) -> int:
    """Of a linear's weight in a pass."""
    return 4 if work.recipe.compute_dtype_on(placement.device.type) == "float32" else 2


def _states(work: Work, placement: Placement) -> Memory:
    """Hidden states that a forward pass goes on with, of all sequences, asymmetric in two models; guided: on the host,
    of a shard, with gradients."""
    if work.guided and work.recipe.prefix == "full":
        return Memory(0, 3 * 4 * work.hidden * -(-work.tokens // SHARDS))
    return _kept(placement.hidden, _states_bytes(work))


def _states_bytes(work: Work) -> int:
    return 4 * (1 + bool(work.recipe.asymmetric)) * work.hidden * work.tokens


def _kept_states(work: Work, placement: Placement) -> int:
    """Inputs of all blocks and the gradient by one's, where they are not in files."""
    return _all_states_bytes(work) if placement.states else 0


def _all_states_bytes(work: Work) -> int:
    return 4 * work.hidden * work.tokens * (work.blocks + 2) if work.guided else 0


def _solving(work: Work, placement: Placement) -> Memory:
    """The block's second moments, those of one linear and, damped, for the descent, its factor, and the solver's
    arrays; packed, what is being written and what comes after it."""
    square = 4 * _widest(work) ** 2
    arrays = max(FACTOR_PANELS * _panel_bytes(work), square * bool(work.recipe.descent) + _chunk_bytes(work, placement))
    own = square if work.recipe.asymmetric or not placement.moments.holds(placement.device) else 0
    here = Memory(own + arrays + 3 * square * _is_whole(work) + _correction_bytes(work), 0)
    if work.recipe.prefix == "quantized":  # what the passes go on with
        here += Memory(_blocks_bytes(work, placement), 0)
    guided = work.guided and work.recipe.prefix == "full"
    states = Memory(0, _kept_states(work, placement)) if guided else _states(work, placement)
    here += Memory(0, 2 * max((tensor.nbytes for tensor in work.block), default=0))
    return here + states + _kept(placement.moments, _sums_bytes(work, placement)) + _kept_factor(work, placement)


def _is_whole(work: Work) -> bool:
    """Whether linears are solved whole, and under second moments that are put in another order."""
    return any(isinstance(codec_named(tensor.codec_name), SectionedCodec) for tensor in work.block)


def _chunk_bytes(work: Work, placement: Placement) -> int:
    """The solver's arrays for as many rows as are solved at once."""
    whole = _is_whole(work)
    rows = [(tensor.matrix[0] if whole else min(placement.rows, tensor.matrix[0])) for tensor in work.block]
    most = max((count * tensor.matrix[1] for count, tensor in zip(rows, work.block, strict=True)), default=0)
    return SOLVER_MATRICES * 4 * most


def _correction_bytes(work: Work) -> int:
    """A low-rank correction's arrays in float64: the error twice, and what weighs its columns."""
    if not work.recipe.rank:
        return 0
    return max((8 * (2 * tensor.weights + tensor.matrix[1] ** 2) for tensor in work.block), default=0)


def placements(work: Work, device: torch.device, folder: Path) -> Iterator[Placement]:
    """Ways to keep less on the device, then on the host, the faster ones first."""
    kept = locations(device, folder)
    most = max((whole_tiles(tensor.matrix[0] + ROW_TILE - 1) for tensor in work.block), default=ROW_TILE)
    for moments in range(len(kept)):
        hidden = kept[max(moments, len(kept) - 2)]  # on the host, unless even second moments have to be in files
        for parts, factors in product(_parts(work), sorted({max(0, moments - 1), moments})):
            for rows in _chunks(most):
                yield Placement(device, kept[moments], kept[factors], rows, parts, hidden)


def _chunks(rows: int) -> Iterator[int]:
    """Half as many rows, and again, down to a tile."""
    while rows > ROW_TILE:
        yield rows
        rows = whole_tiles(rows // 2)
    yield ROW_TILE


def _parts(work: Work) -> list[int]:
    """In how many parts a block's second moments may be: a pass more for each costs less than keeping them elsewhere,
    where all that passes share is full precision."""
    experts = len({number for tensor in work.block if (number := expert_number(tensor.name)) is not None})
    if work.recipe.prefix != "full" or experts < 2:
        return [1]
    return [*(1 << power for power in range((experts - 1).bit_length())), experts]


@dataclass(frozen=True)
class MemoryLimits:
    """Bytes that a run may use of the device, where that is a GPU, and of the host; None for any number."""

    device: int | None = None
    host: int | None = None

    def shared(self, processes: int) -> MemoryLimits:
        """The share of each of several processes, which have a GPU each, or share the CPU."""
        return MemoryLimits(self.device, self.host and self.host // processes)

    def excess(self, stage: Memory, device: torch.device) -> list[tuple[str, int, int]]:
        """Where a stage does not fit: `device` or `host`, what it takes, and what there is."""
        if device.type == "cpu":
            pairs = [("host", stage.device + stage.host, self.host)]
        else:
            pairs = [("device", stage.device, self.device), ("host", stage.host, self.host)]
        return [(name, takes, there) for name, takes, there in pairs if there is not None and takes > there]


def available(device: torch.device) -> MemoryLimits:
    """What is free now."""
    return MemoryLimits(
        torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None, psutil.virtual_memory().available
    )


def choose_placement(work: Work, device: torch.device, folder: Path, limits: MemoryLimits) -> Placement:
    """The fastest way that fits; the smallest where none does. `folder` is for files, where the host has no room."""
    for placement in placements(work, device, folder):
        stages = memory(work, placement)
        if not any(limits.excess(stages[name], device) for name in (PASSING, AIMING, SOLVING) if name in stages):
            break
    if device.type == "cpu":  # where the passes take so long that what disk and codecs take does not matter
        return placement
    passing, tuning = _passing(work, placement), _tuning_memory(work, placement)
    if _states_bytes(work) <= _half(limits.device, max(stage.device for stage in stages.values())):
        placement = replace(placement, hidden=locations(device, folder)[0])
    states = _all_states_bytes(work) <= _half(limits.host, passing.host)
    return replace(
        placement, states=states, unpacked=(_half(limits.device, tuning.device), _half(limits.host, tuning.host))
    )


def _half(there: int | None, taken: int) -> int:
    """Half of what is left beside a stage and the process."""
    return 1 << 62 if there is None else max(0, there - taken - PROCESS_BYTES) // 2


def _unpacked(work: Work, placement: Placement) -> Memory:
    """What tuning keeps unpacked."""
    needed = int((1 + NUMBERS) * sum(tensor.weights for tensor in work.linears))
    device = min(needed, placement.unpacked[0])
    return Memory(device, min(needed - device, placement.unpacked[1]))


def told(placement: Placement) -> str:
    """What was chosen, in a sentence."""
    parts = (
        f" A block's experts are solved in {placement.parts} parts, with a pass for each."
        if placement.parts > 1
        else ""
    )
    return (
        f"Second moments are kept on the {placement.moments.name}, factors on the {placement.factors.name}, and up to "
        f"{placement.rows} rows of a linear are solved at once.{parts}"
    )


def _tuning_memory(work: Work, placement: Placement) -> Memory:
    """Both models' outputs, a block with its codes, and what the largest of its tensors leaves on the way back; before
    that a sequence's logits. On the host, with the depth of the model, the tuned numbers, their gradients and Adam's
    moments and a sequence's states; of every sequence, the first and the last states."""
    length, vocabulary = work.recipe.sequence_length, int(work.config["vocab_size"])
    block = (1 + _weight_bytes(work, placement)) * sum(tensor.weights for tensor in work.block)
    largest = _largest(work)
    device = 2 * 4 * work.outer + max(block + TUNED_MATRICES * 4 * largest, 8 * 4 * length * vocabulary)
    states = 4 * length * work.hidden * (work.blocks + 1 + 2 * (work.recipe.tuned_sequences + HELD_OUT))
    return Memory(device, states + 4 * 4 * tuned_numbers(work))


def tuned_numbers(work: Work) -> int:
    """How many stored floating-point numbers tuning moves."""
    vectors = sum(tensor.weights for tensor in work.tensors if len(tensor.shape) == 1)
    return vectors + sum(_grid_numbers(tensor.codec_name, *tensor.matrix) for tensor in work.linears)


@lru_cache
def _grid_numbers(name: str, rows: int, columns: int) -> int:
    """Of one linear: those of one row's grid, for every row."""
    kind = codec_named(name)
    if not isinstance(kind, GridCodec):
        return 0
    parts = numbers(minmax(kind, torch.ones(1, columns))).values()
    return rows * sum(len(part.flatten()) for part in parts)
