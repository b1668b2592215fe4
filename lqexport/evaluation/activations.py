"""Emulates activation quantization in float32: the results of a runtime that rounds the inputs of linears.

LQER's W4A8 and W4A6 round the inputs of every linear (`native:mxint-8-g16`, `native:mxint-6-g16`). They also round the
inputs of the low-rank product and of the two products inside attention; this emulation does not.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lqexport.converters.factors import block_codec
from lqexport.errors import UserError
from lqexport.formats.codec import GridCodec
from lqexport.formats.registry import codec_named
from lqexport.grids.fit import minmax


def rounding(codec_name: str) -> Callable[[Tensor], Tensor]:
    """Returns a function that rounds inputs [..., columns] to the codec's grid, and keeps shape and dtype.

    The scale of each group of columns comes from the group's largest value. Raises UserError for a codec without a
    grid for each block of columns.
    """
    codec = codec_named(block_codec(codec_name, "activations"))
    if not isinstance(codec, GridCodec):
        raise UserError(f"activations: {codec.name} has no grid; give a type such as native:mxint-8-g16.")

    def rounded(inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        grid = minmax(codec, rows)
        return grid.values(grid.nearest(rows)).reshape(inputs.shape).to(inputs.dtype)

    return rounded
