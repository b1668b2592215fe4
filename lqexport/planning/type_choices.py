"""The types that a choice by size has for a tensor, before any is measured.

TQ1_0, TQ2_0, MXFP4 and NVFP4 are left out: other types, or two of them side by side, lose less in as many bytes. So is
Q1_0, which is smaller than all and loses several times as much as the next (bench/type_losses.py).
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from lqexport.converters.mlx.types import same_groups
from lqexport.converters.plan import PlannedTensor
from lqexport.errors import UserError
from lqexport.formats.codec import nbytes
from lqexport.formats.registry import codec_named
from lqexport.recipe import Recipe
from lqexport.sizes import human_bytes

SUPERBLOCKS = ("gguf:Q2_K", "gguf:Q3_K", "gguf:Q4_K", "gguf:Q5_K", "gguf:Q6_K", "gguf:Q8_0")
BLOCKS = ("gguf:Q4_0", "gguf:Q4_1", "gguf:Q5_0", "gguf:Q5_1", "gguf:Q8_0")
"""The types for columns that are a multiple of 256 (SUPERBLOCKS) or only of 32 (BLOCKS), besides i-quants."""
OUTER = ("gguf:Q4_K", "gguf:Q5_K", "gguf:Q6_K", "gguf:Q8_0")
SMALL_OUTER = ("gguf:Q2_K", "gguf:Q3_K")
"""The types for the embedding and the output, and the smaller ones that only a size below SMALL may need."""
SMALL = 4.0
"""Bits per weight of the whole model below which tensors may need types of fewer than 3 bits."""
SMALLEST = 3.0
"""Bits per weight below which they may need types of fewer than 2 bits."""

RELATIVES = {
    "gguf:IQ4_NL": "gguf:Q4_0",
    "gguf:IQ4_XS": "gguf:Q4_K",
    "gguf:IQ3_S": "gguf:Q3_K",
    "gguf:IQ3_XXS": "gguf:Q3_K",
    "gguf:IQ2_S": "gguf:Q2_K",
    "gguf:IQ2_XS": "gguf:Q2_K",
    "gguf:IQ2_XXS": "gguf:Q2_K",
    "gguf:IQ1_M": "gguf:Q2_K",
    "gguf:IQ1_S": "gguf:Q2_K",
}
"""I-quant -> the type of nearly its size, by whose loss its own is predicted (`lqexport.pipeline.type_losses`)."""


def choices_by_size(planned: list[PlannedTensor], recipe: Recipe, limit_bytes: int) -> dict[str, tuple[str, ...]]:
    """Returns the codecs to choose from for each tensor that has more than one and none by hand."""
    bits = 8 * limit_bytes / sum(tensor.weights for tensor in planned)
    patterns = recipe.types_by_pattern()
    free = [tensor for tensor in planned if not any(fnmatchcase(tensor.name, pattern) for pattern in patterns)]
    names = {tensor.name: choices_of(tensor, bits, recipe.without == "iq") for tensor in free}
    return {name: codecs for name, codecs in names.items() if len(codecs) > 1}


def check_size(recipe: Recipe, planned: list[PlannedTensor], limit_bytes: int | None) -> None:
    """Raises UserError if even the smallest types that a choice by the recipe's size has take more bytes.

    limit_bytes   what `size_limit` returns
    """
    if limit_bytes is None:
        return
    codecs = choices_by_size(planned, recipe, limit_bytes)
    least = sum(
        min(nbytes(codec_named(name), *tensor.matrix) for name in codecs.get(tensor.name, (tensor.codec_name,)))
        for tensor in planned
    )
    if limit_bytes < least:
        bits = 8 * least / sum(tensor.weights for tensor in planned)
        raise UserError(
            f"The smallest types that the model can have take {human_bytes(least)} ({bits:.3f} bits per weight), and "
            f"--size {recipe.size} is {human_bytes(limit_bytes)}. Give a larger size."
        )


def choices_of(tensor: PlannedTensor, bits: float, without_iq: bool) -> tuple[str, ...]:
    """Returns the names of the codecs that may hold a tensor; its own alone if there is nothing to choose.

    bits         bits per weight of the size that the whole model may take
    without_iq   whether i-quants are left out
    """
    if len(tensor.shape) == 1:
        return (tensor.codec_name,)
    columns = tensor.shape[1]
    if tensor.codec_name.startswith("mlx:"):
        return same_groups(tensor.codec_name)
    if columns % 32:
        return (tensor.codec_name,)
    if not tensor.linear:
        return ((*SMALL_OUTER, *OUTER) if bits < SMALL else OUTER) if columns % 256 == 0 else ("gguf:Q8_0",)
    known = BLOCKS if columns % 256 else SUPERBLOCKS
    return known if without_iq else (*known, *(name for name in RELATIVES if _may_need(name, known, bits)))


def _may_need(name: str, known: tuple[str, ...], bits: float) -> bool:
    """Returns whether an i-quant is a choice beside `known` types for a model of so many bits per weight."""
    least = {"gguf:IQ1": SMALLEST, "gguf:IQ2": SMALL}.get(name[:8])
    return RELATIVES[name] in known and (least is None or bits < least)
