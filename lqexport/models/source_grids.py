"""Handles weights that are already quantized in the source.

If the target's codec can hold every value unchanged, the codes and the grid are moved to it. Otherwise the weight is
decoded and solved again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from lqexport.converters.models.architectures import architecture_of
from lqexport.converters.plan import PlannedTensor
from lqexport.formats.codec import PlainCodec, TrellisCodec, nbytes
from lqexport.formats.moves import AffineGrid, FloatGrid, TableGrid, move
from lqexport.formats.registry import codec_named, family_of, names
from lqexport.models.column_order import Reordered
from lqexport.models.interface import ModelShapes
from lqexport.models.joined import Joined
from lqexport.models.source import HuggingFaceSource, Source
from lqexport.storage.artifact import StoredTensor
from lqexport.target import Target

KEPT = "kept"
"""The value of `source_grid` for a tensor that is moved."""


def outer_types(source: ModelShapes, target: Target) -> tuple[str | None, str | None]:
    """Returns the types of the embedding and the output layer that apply unless the recipe gives others.

    If the target is one GGUF type and the source a quantized checkpoint, they are the types that the checkpoint stores
    them in, since it left them unquantized. None stands for the target's own choice.
    """
    if (checkpoint := _checkpoint(source)) is None or str(target) not in names("gguf"):
        return None, None
    architecture = architecture_of(source.config)
    return _stored_type(checkpoint, architecture.embedding), _stored_type(checkpoint, architecture.output)


def _checkpoint(source: ModelShapes) -> HuggingFaceSource | None:
    """Returns the quantized checkpoint that a source is; None if it is none, or a smoothed one."""
    inner = source.source if isinstance(source, Reordered | Joined) else source
    return inner if isinstance(inner, HuggingFaceSource) and inner.layout is not None else None


def _stored_type(source: HuggingFaceSource, name: str) -> str | None:
    if name not in source.names() or source.module(name):
        return None
    codec_name = f"gguf:{source.dtype(name)}"
    return codec_name if codec_name in names("gguf") else None


def with_moves(source: ModelShapes, planned: list[PlannedTensor]) -> list[PlannedTensor]:
    """Returns the plan with `source_grid` set for each weight that is quantized in the source.

    It is KEPT if the weight is moved, in which case the solver does not work on it, else the reason why not.
    """
    if (checkpoint := _checkpoint(source)) is None:
        return planned
    rearranged = source if isinstance(source, Reordered | Joined) else None
    staying = [tensor for tensor in planned if not (rearranged and rearranged.moves(tensor.name))]
    moved_or_not = {tensor.name: _with_source_grid(checkpoint, tensor) for tensor in staying}
    return [moved_or_not.get(tensor.name, tensor) for tensor in planned]


def _with_source_grid(source: HuggingFaceSource, tensor: PlannedTensor) -> PlannedTensor:
    module = source.module(tensor.name)
    if module is None or isinstance(codec_named(tensor.codec_name), PlainCodec):
        return tensor
    assert source.layout is not None  # it knows the module
    if (grid := source.layout.grid(module)) is None:
        return replace(tensor, source_grid=source.layout.gridless)
    reason = _misfit(grid, tensor.codec_name)
    if reason is None:
        return replace(tensor, linear=False, source_grid=KEPT)
    family = names(family_of(tensor.codec_name).partition("-")[0])
    possible = [name for name in family if tensor.matrix[1] % codec_named(name).block == 0]
    # The smallest come first, so that few are tried: each try computes the grid of the whole matrix.
    by_size = sorted(possible, key=lambda name: nbytes(codec_named(name), *tensor.matrix))
    smallest = next((name for name in by_size if _misfit(grid, name) is None), None)
    return replace(tensor, source_grid=f"{reason}; {smallest} would hold it" if smallest else reason)


def _misfit(grid: AffineGrid | FloatGrid | TableGrid, name: str) -> str | None:
    """Returns why the codec `name` cannot hold a grid; None if it can."""
    try:
        move(grid, codec_named(name))
    except ValueError as error:
        return str(error)
    return None


def moved(source: Source, tensor: PlannedTensor) -> StoredTensor:
    """Returns a weight that `with_moves` marked as KEPT, packed in its planned codec.

    Its values are the source's, bit for bit except for the sign of zeros. In GPTQ's layout they are first rounded to
    float16, as its readers do.
    """
    checkpoint = _checkpoint(source)
    assert checkpoint is not None  # no other source has such weights
    assert checkpoint.layout is not None
    codec, module = codec_named(tensor.codec_name), checkpoint.module(tensor.name)
    assert not isinstance(codec, PlainCodec | TrellisCodec)
    assert module is not None
    source_grid, source_codes = checkpoint.layout.grid(module), checkpoint.layout.codes(module)
    assert source_grid is not None
    target = move(source_grid, codec)
    planes = codec.encode(target.grid, target.codes(source_codes))  # type: ignore[arg-type]  # a grid of this codec
    values = source_grid.values(source_codes)
    if family_of(codec.name) == "gptq":
        values = values.astype(np.float16).astype(np.float32)
    if not np.array_equal(codec.decode(planes, tensor.shape[1]), values):
        raise AssertionError(f"{tensor.name}: {codec.name} decodes to other values than the checkpoint. This is a bug.")
    return StoredTensor(tensor.name, tensor.codec_name, tensor.shape, planes, {"source_grid": KEPT})


def sentences(planned: list[PlannedTensor]) -> list[str]:
    """Returns sentences for the terminal on which tensors are moved and which are solved again, and why.

    Empty for a source without quantized weights.
    """
    counts = Counter((tensor.source_grid, tensor.codec_name) for tensor in planned if tensor.source_grid)
    return [
        f"{count} tensors move to {codec_name} as they are: grid, codes, every value."
        if grid == KEPT
        else f"{count} tensors are solved again from their decoded weights, since {codec_name} does not hold them: "
        f"{grid}."
        for (grid, codec_name), count in counts.items()
    ]
