"""Names and settings that families with state space models (Mamba, Mamba-2) share."""

from __future__ import annotations

import math
from typing import Any

from lqexport.converters.models.architecture import KEY_HEADS, Config, Key
from lqexport.converters.models.hf_defaults import FULL

RECURRENT = "linear_attention"
"""The type of blocks with a state space model in `layer_types` of config.json."""
OLDER_TYPES = {"mamba": RECURRENT, "attention": FULL}
"""Older name of a type of blocks -> the usual name."""
UNLIMITED = [0.0, math.inf]
"""`time_step_limit` of config.json where time steps are not limited; llama.cpp has no limits."""
KEY_HEADS_OF_BLOCKS = Key(KEY_HEADS, "key_heads_of_blocks", many=True)


def mamba2_modules(mixer: str) -> dict[str, str]:
    """Returns the modules of a Mamba-2 mixer: Hugging Face module -> GGUF name."""
    names = {"in_proj": "ssm_in", "conv1d": "ssm_conv1d", "norm": "ssm_norm", "out_proj": "ssm_out"}
    return {f"{mixer}.{module}": gguf for module, gguf in names.items()}


def mamba2_tensors(mixer: str) -> dict[str, str]:
    """Returns the tensors of a Mamba-2 mixer that are no module's weight or bias: Hugging Face name -> GGUF name."""
    return {f"{mixer}.dt_bias": "ssm_dt.bias", f"{mixer}.A_log": "ssm_a", f"{mixer}.D": "ssm_d"}


def mamba1_modules(mixer: str) -> dict[str, str]:
    """Returns the modules of a mixer of Mamba (the first one): Hugging Face module -> GGUF name."""
    names = {"in_proj": "ssm_in", "conv1d": "ssm_conv1d", "x_proj": "ssm_x", "dt_proj": "ssm_dt", "out_proj": "ssm_out"}
    return {f"{mixer}.{module}": gguf for module, gguf in names.items()}


def mamba1_linears(mixer: str) -> tuple[tuple[str, ...], ...]:
    """Returns the linears of such a mixer that are solved. `dt_proj` is `rounded`: transformers does not call it."""
    return tuple((f"{mixer}.{module}",) for module in ("in_proj", "x_proj", "out_proj"))


def mamba1_tensors(mixer: str) -> dict[str, str]:
    """Returns the tensors of such a mixer that are no module's weight or bias: Hugging Face name -> GGUF name."""
    return {f"{mixer}.A_log": "ssm_a", f"{mixer}.D": "ssm_d"}


def time_steps(config: Config, key: str) -> Config:
    """Returns the number of columns of `dt_proj`, which transformers computes from the hidden size for "auto"."""
    rank = config.get(key)
    return {key: -(-config.get("hidden_size", 0) // 16) if rank in (None, "auto") else rank}


def block_types(types: Any) -> Any:
    """Returns the types of the blocks by their usual names."""
    return [OLDER_TYPES.get(name, name) for name in types] if isinstance(types, list) else types


def key_heads(config: Config, types: Any) -> Config:
    """Returns the number of key heads of each block, as llama.cpp wants it: 0 where a block has no attention.

    Returns {} where config.json does not say enough.
    """
    heads = config.get("num_key_value_heads") or config.get("num_attention_heads")
    if not isinstance(types, list) or not isinstance(heads, int):
        return {}
    return {"key_heads_of_blocks": [heads if name == FULL else 0 for name in types]}


def time_step_limit(config: Config) -> Config:
    """Returns `time_step_limit` as UNLIMITED where it does not limit anything, in whatever spelling."""
    limit = config.get("time_step_limit")
    lower, upper = limit if isinstance(limit, list | tuple) and len(limit) == 2 else (0, math.inf)
    upper = upper.get("__float__") if isinstance(upper, dict) else upper  # transformers' spelling in JSON
    unlimited = lower == 0 and upper in (math.inf, "Infinity", "inf")
    return {"time_step_limit": UNLIMITED if unlimited else limit}
