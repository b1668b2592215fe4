"""The order in which llama.cpp wants a linear's rows. Quantized blocks lie within rows, so reordering loses nothing."""

from __future__ import annotations

from typing import Any

import numpy as np

from lqexport.converters.models.architecture import Architecture, Order
from lqexport.converters.models.tensor_names import block_module, head_count
from lqexport.converters.models.value_heads import keys_before, tiled_after
from lqexport.errors import UserError


def row_order(architecture: Architecture, config: dict[str, Any], name: str, rows: int) -> Order | None:
    """Returns the Hugging Face row that each GGUF row of a weight or bias holds: `gguf = hugging_face[order]`.

    Returns None where both have the same order. Raises UserError if config.json does not fit the number of rows.
    """
    module = block_module(architecture, name)
    if module is None:
        return None
    whole = f"{module[1]}.{module[2]}"
    layout, key = architecture.rows.get(module[1]) or architecture.rows.get(whole) or (None, "")
    if layout is None:
        return None
    if layout.startswith("values"):
        return tiled_after(keys_before(config) if layout == "values_last" else 0, rows, config)
    count = head_count(config, key)
    return rope_order(rows, count) if layout == "rope" else qkv_order(rows, count, head_count(config))


def rope_order(rows: int, heads: int) -> Order:
    """Returns the order that interleaves the halves of each head: rows 0 1 2 3 of a head become 0 2 1 3.

    Hugging Face rotates row i of the first half of a head together with row i of the second half; llama.cpp rotates
    neighbouring rows. Raises UserError if the rows are not `heads` heads of an even size.
    """
    if rows % (2 * heads):
        raise UserError(f"{rows} rows are not {heads} heads of an even size; config.json does not fit the weights.")
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def qkv_order(rows: int, groups: int, heads: int) -> Order:
    """Returns the order that puts all queries first, then all keys, then all values.

    Hugging Face has `groups` runs, each of some query heads with their key head and value head. Raises UserError if
    the rows are not such groups of heads.
    """
    if heads % groups or rows % (heads + 2 * groups):
        raise UserError(
            f"{rows} rows are not {heads} query heads in {groups} groups; config.json does not fit the weights."
        )
    order = np.arange(rows).reshape(groups, heads // groups + 2, -1)
    return np.concatenate([order[:, :-2].reshape(-1), order[:, -2].reshape(-1), order[:, -1].reshape(-1)])
