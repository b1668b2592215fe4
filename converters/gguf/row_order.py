"""The order in which llama.cpp wants a linear's rows. Moving rows moves whole blocks, so nothing is lost."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.tensor_names import block_module, head_count
from lqexport.errors import UserError

Order = NDArray[np.int64]


def row_order(architecture: Architecture, config: dict[str, Any], name: str, rows: int) -> Order | None:
    """The row of Hugging Face that each row of GGUF holds: `gguf = hugging_face[order]`, for a weight or a bias; None
    where they are the same. Raises UserError where config.json does not fit the number of rows."""
    module = block_module(architecture, name)
    kind, key = architecture.rows.get(module[1], (None, "")) if module else (None, "")
    if kind is None:
        return None
    count = head_count(config, key)
    return rope_order(rows, count) if kind == "rope" else qkv_order(rows, count, head_count(config))


def rope_order(rows: int, heads: int) -> Order:
    """Hugging Face rotates the first half of a head against the second, llama.cpp neighbours, so a head of rows
    0 1 2 3 is stored as 0 2 1 3. Raises UserError where the rows are not pairs in every head."""
    if rows % (2 * heads):
        raise UserError(f"{rows} rows are not {heads} heads of an even size; config.json does not fit the weights.")
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def qkv_order(rows: int, groups: int, heads: int) -> Order:
    """All queries, then all keys, then all values, where Hugging Face has `groups` runs of some queries with their key
    and value. Raises UserError where the rows are not such groups of heads."""
    if heads % groups or rows % (heads + 2 * groups):
        raise UserError(
            f"{rows} rows are not {heads} query heads in {groups} groups; config.json does not fit the weights."
        )
    order = np.arange(rows).reshape(groups, heads // groups + 2, -1)
    return np.concatenate([order[:, :-2].reshape(-1), order[:, -2].reshape(-1), order[:, -1].reshape(-1)])
