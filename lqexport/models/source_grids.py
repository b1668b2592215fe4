"""Weights that the source holds quantized already: moved, codes and grid, where the target's codec holds every value as
it is; else solved again from what they decode to."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from lqexport.converters.models.architectures import architecture_of
from lqexport.converters.plan import PlannedTensor
from lqexport.formats.codec import PlainCodec, nbytes
from lqexport.formats.moves import AffineGrid, TableGrid, move
from lqexport.formats.registry import codec_named, names
from lqexport.models.interface import ModelShapes
from lqexport.models.source import HuggingFaceSource, Source
from lqexport.storage.artifact import StoredTensor

KEPT = "kept"
"""`source_grid` of a tensor that was moved."""


def outer_types(source: ModelShapes, target: str) -> tuple[str | None, str | None]:
    """What embedding and output are stored as unless the recipe says so: for one GGUF type, what a quantized checkpoint
    has them in, since it left them as they were; None for the target's own choice."""
    if not isinstance(source, HuggingFaceSource) or source.layout is None or target not in names("gguf"):
        return None, None
    architecture = architecture_of(source.config)
    return _stored_type(source, architecture.embedding), _stored_type(source, architecture.output)


def _stored_type(source: HuggingFaceSource, name: str) -> str | None:
    if name not in source.names() or source.module(name):
        return None
    kind = f"gguf:{source.dtype(name)}"
    return kind if kind in names("gguf") else None


def with_moves(source: ModelShapes, planned: list[PlannedTensor]) -> list[PlannedTensor]:
    """The plan, with what becomes of each quantized weight's grid; the solver does not work on those that move."""
    if not isinstance(source, HuggingFaceSource) or source.layout is None:
        return planned
    return [_judged(source, tensor) for tensor in planned]


def _judged(source: HuggingFaceSource, tensor: PlannedTensor) -> PlannedTensor:
    module = source.module(tensor.name)
    if module is None or isinstance(codec_named(tensor.codec_name), PlainCodec):
        return tensor
    grid = source.layout.grid(module) if source.layout else None
    reason = _misfit(grid, tensor.codec_name)
    if reason is None:
        return replace(tensor, linear=False, source_grid=KEPT)
    family = names(tensor.codec_name.partition(":")[0])
    possible = [name for name in family if tensor.matrix[1] % codec_named(name).block == 0]
    # Smallest first, so that few are tried: each try computes the grid of the whole matrix.
    by_size = sorted(possible, key=lambda name: nbytes(codec_named(name), *tensor.matrix))
    smallest = next((name for name in by_size if _misfit(grid, name) is None), None)
    return replace(tensor, source_grid=f"{reason}; {smallest} would hold it" if smallest else reason)


def _misfit(grid: AffineGrid | TableGrid | None, name: str) -> str | None:
    """Why the codec `name` does not hold a grid; None where it does."""
    if grid is None:
        return "its codes are floating-point numbers"
    try:
        move(grid, codec_named(name))
    except ValueError as error:
        return str(error)
    return None


def moved(source: Source, tensor: PlannedTensor) -> StoredTensor:
    """A weight that `with_moves` found to fit, packed in its codec. Its values are the source's, bit for bit but for
    the sign of zeros; those of GPTQ's layout are rounded to float16, as its readers compute."""
    assert isinstance(source, HuggingFaceSource)  # no other has such weights
    assert source.layout is not None
    kind, module = codec_named(tensor.codec_name), source.module(tensor.name)
    assert not isinstance(kind, PlainCodec)
    assert module is not None
    found, stored = source.layout.grid(module), source.layout.codes(module)
    assert found is not None
    target = move(found, kind)
    planes = kind.encode(target.grid, target.codes(stored))  # type: ignore[arg-type]  # a grid of this codec
    values = found.values(stored)
    if kind.name.startswith("gptq:"):
        values = values.astype(np.float16).astype(np.float32)
    if not np.array_equal(kind.decode(planes, tensor.shape[1]), values):
        raise AssertionError(f"{tensor.name}: {kind.name} decodes to other values than the checkpoint. This is a bug.")
    return StoredTensor(tensor.name, tensor.codec_name, tensor.shape, planes, {"source_grid": KEPT})


def sentences(planned: list[PlannedTensor]) -> list[str]:
    """What becomes of the checkpoint's grids, for the terminal; nothing for a source that has none."""
    found = Counter((tensor.source_grid, tensor.codec_name) for tensor in planned if tensor.source_grid)
    return [
        f"{count} tensors move to {kind} as they are: grid, codes, every value."
        if grid == KEPT
        else f"{count} tensors are solved again from their decoded weights, since {kind} does not hold them: {grid}."
        for (grid, kind), count in found.items()
    ]
