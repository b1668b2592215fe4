"""The parts that fused linears are cut into (`parts` of an architecture): their names, rows and values."""

from __future__ import annotations

import torch
from torch import Tensor

from lqexport.converters.models.architecture import Architecture, Config, Order
from lqexport.converters.models.tensor_names import block_module, head_count


def parts_of(architecture: Architecture, config: Config, name: str) -> dict[str, Order]:
    """Returns the name of each part of a fused linear's weight -> its rows of that weight; {} for other tensors."""
    _, module, end = block_module(architecture, name) or (0, "", "")
    if module not in architecture.parts or end != "weight":
        return {}
    orders = architecture.parts[module](config)
    return {f"{name.removesuffix(end)}{part}.{end}": rows for part, rows in orders.items()}


def groups_of(architecture: Architecture | None, config: Config, name: str) -> int:
    """Returns the number of groups of rows by which a part is transposed (`turned`); 0 if it is not."""
    module = block_module(architecture, name) if architecture else None
    key = architecture.turned.get(module[1]) if architecture and module else None
    return head_count(config, key) if key else 0


def part_shape(whole: tuple[int, ...], rows: int, groups: int) -> tuple[int, ...]:
    """Returns the shape of a part with `rows` rows of a fused weight of the shape `whole`."""
    return (groups * whole[1], rows // groups) if groups else (rows, *whole[1:])


def part(whole: Tensor, rows: Order, groups: int) -> Tensor:
    """Returns the part of a fused weight [rows, columns] that has these rows, transposed group by group."""
    return _turned(whole[torch.from_numpy(rows)], groups)


def whole(parts: list[tuple[Tensor, Order, int]]) -> Tensor:
    """Returns the fused weight of its parts, each with its rows and its groups: the inverse of `part`."""
    places = torch.cat([torch.from_numpy(rows) for _, rows, _ in parts])
    return torch.cat([_turned(values, groups) for values, _, groups in parts])[places.argsort()]


def _turned(values: Tensor, groups: int) -> Tensor:
    """Returns a matrix with each of `groups` groups of rows transposed, which undoes itself; with 0 groups as it is."""
    return values.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1) if groups else values
