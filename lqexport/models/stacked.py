"""Finds the linears of experts in checkpoints that store all experts of a block in one tensor."""

from __future__ import annotations

from typing import NamedTuple

from lqexport.converters.models.architecture import EACH, Architecture
from lqexport.converters.models.tensor_names import block_module


class ExpertRows(NamedTuple):
    """The rows of a stored tensor [experts, rows, columns] that are one linear of one expert.

    expert        the expert's number
    first, last   the linear's rows: from `first` up to, not including, `last`
    """

    expert: int
    first: int
    last: int


def is_stacked(architecture: Architecture, name: str) -> bool:
    """Whether a checkpoint's tensor holds linears of all experts of a block, by `stacked` of the architecture."""
    module = block_module(architecture, name)
    return module is not None and f"{module[1]}.{module[2]}" in architecture.stacked


def linears_within(architecture: Architecture, name: str, shape: tuple[int, ...]) -> dict[str, ExpertRows]:
    """Returns the name of the weight of every linear that a stacked tensor holds, and where the tensor holds it.

    name    the tensor's name, with the modules' names as in the model
    shape   its shape [experts, rows, columns]
    """
    layer, module, end = block_module(architecture, name) or (0, "", "")
    linears = architecture.stacked[f"{module}.{end}"]
    experts, rows = shape[:2]
    size = rows // len(linears)
    return {
        f"{architecture.blocks}.{layer}.{linear.replace(EACH, str(expert))}.weight": ExpertRows(
            expert, index * size, (index + 1) * size
        )
        for expert in range(experts)
        for index, linear in enumerate(linears)
    }
