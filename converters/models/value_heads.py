"""The order of the value heads of a gated delta net, whose key heads serve several value heads each.

transformers has the value heads of one key head side by side: those of key head 0, then those of key head 1. llama.cpp
has them tiled: the first value head of every key head, then the second of every key head. Rows are put into that order
when a file is written (`gguf/row_order.py`). Columns are quantized in blocks, which may span heads, so they are put
into it before the run (`lqexport/models/column_order.py`), and config.json then says `TILED`.
"""

from __future__ import annotations

import numpy as np

from lqexport.converters.models.architecture import Architecture, Config, Order
from lqexport.converters.models.tensor_names import block_module, head_count
from lqexport.errors import UserError

TILED = "tiled_columns"
"""The key of config.json that says whether the columns of `tiled` linears are in llama.cpp's order."""
KEY_HEADS, VALUE_HEADS = "linear_num_key_heads", "linear_num_value_heads"


def tiled_after(before: int, count: int, config: Config) -> Order:
    """Returns the order that tiles value heads: `tiled = heads[order]`, int64 [count].

    before   the number of rows that stay where they are, since they come before the value heads
    count    the number of all rows

    Raises UserError if config.json does not fit the number of rows.
    """
    keys, values = head_count(config, KEY_HEADS), head_count(config, VALUE_HEADS)
    if values % keys or count <= before or (count - before) % values:
        raise UserError(f"{count} rows are no {values} value heads of {keys} key heads; config.json does not fit them.")
    heads = np.arange(before, count).reshape(keys, values // keys, -1)
    return np.concatenate([np.arange(before), heads.swapaxes(0, 1).reshape(-1)])


def keys_before(config: Config) -> int:
    """Returns the number of rows of all queries and keys, which come before the values."""
    return 2 * head_count(config, KEY_HEADS) * head_count(config, "linear_key_head_dim")


def tiled_columns(architecture: Architecture, config: Config, name: str, columns: int) -> Order | None:
    """Returns the order of the columns of a weight in which llama.cpp wants them: `tiled = columns[order]`.

    Returns None where transformers has the same order. Raises UserError if config.json does not fit the columns.
    """
    module = block_module(architecture, name)
    if module is None or module[2] != "weight" or module[1] not in architecture.tiled:
        return None
    return None if head_count(config, KEY_HEADS) == head_count(config, VALUE_HEADS) else tiled_after(0, columns, config)


def fused_parts(config: Config) -> dict[str, Order]:
    """Returns the rows of Qwen3-Next's `in_proj_qkvz` that are `qkv` (all queries, all keys, all values), and `z`.

    Each key head has a run of rows: its query, its key, its values, and as many gates. Raises UserError if config.json
    has value heads that are no multiple of the key heads.
    """
    keys, values = head_count(config, KEY_HEADS), head_count(config, VALUE_HEADS)
    if values % keys:
        raise UserError(f"config.json: {VALUE_HEADS} {values} is no multiple of {KEY_HEADS} {keys}.")
    key, value = head_count(config, "linear_key_head_dim"), head_count(config, "linear_value_head_dim") * values // keys
    rows = np.arange(keys * 2 * (key + value)).reshape(keys, -1)
    query, key_rows, value_rows, gates = np.split(rows, [key, 2 * key, 2 * key + value], axis=1)
    return {"qkv": np.concatenate([part.reshape(-1) for part in (query, key_rows, value_rows)]), "z": gates.reshape(-1)}
