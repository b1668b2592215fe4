"""Activation quantization, emulated: what a runtime that rounds the inputs of linears would compute, in float32.

LQER's W4A8 and W4A6 round the inputs of every linear (`native:mxint-8-g16`, `native:mxint-6-g16`). The inputs of its
low-rank product and of the two products inside attention are rounded there too; here they are not.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lqexport.converters.factors import block_codec
from lqexport.errors import UserError
from lqexport.formats.codec import GridCodec
from lqexport.formats.registry import codec_named
from lqexport.grids.fit import minmax


def rounding(kind: str) -> Callable[[Tensor], Tensor]:
    """Inputs [..., C] as the format `kind` holds them, scales from each group's own largest value.

    Raises UserError for a type without a grid per block of columns.
    """
    found = codec_named(block_codec(kind, "activations"))
    if not isinstance(found, GridCodec):
        raise UserError(f"activations: {found.name} has no grid; give a type such as native:mxint-8-g16.")

    def rounded(inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        grid = minmax(found, rows)
        return grid.values(grid.nearest(rows)).reshape(inputs.shape).to(inputs.dtype)

    return rounded
