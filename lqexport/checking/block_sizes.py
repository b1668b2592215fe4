"""The sizes that a file's metadata give for one block, from which the shapes of its tensors follow.

A size that the metadata do not give is not a number (NaN), and so is all that is computed from it.
"""

from __future__ import annotations

from math import nan
from typing import Any

from lqexport.checking.opened import OpenFile
from lqexport.converters.models.architecture import KEY_HEADS, WINDOW_PERIOD

BlockSizes = dict[str, float]
"""Name of a size in `shape_table.py` -> its value, a whole number or NaN."""
COUNTS = {
    "vocabulary": "vocab_size",
    "context": "context_length",
    "token types": "token_type_count",
    "rotated": "rope.dimension_count",
    "query rank": "attention.q_lora_rank",
    "rank": "attention.kv_lora_rank",
    "output rank": "attention.output_lora_rank",
    "output groups": "attention.output_group_count",
    "index heads": "attention.indexer.head_count",
    "index width": "attention.indexer.key_length",
    "experts": "expert_count",
    "used experts": "expert_used_count",
    "ratio": "attention.compress_ratios",
    "streams": "hyper_connection.count",
    "inner": "ssm.inner_size",
    "state": "ssm.state_size",
    "steps": "ssm.time_step_rank",
    "kernel": "ssm.conv_kernel",
    "recurrent width": "kda.head_dim",
    "cache": "shortconv.l_cache",
    "inputs": "altup.num_inputs",
    "layer width": "embedding_length_per_layer_input",
    **{f"{name}_{number}": f"dense_{number}_feat_{name}" for number in (2, 3) for name in ("in", "out")},
}
"""Name of a size -> the key of the architecture that gives it."""
BY_MLP = ("hunyuan-moe", "minimax-m2")
"""Architectures whose experts llama.cpp takes to be as wide as an MLP, whatever `expert_feed_forward_length` says."""


def block_sizes(file: OpenFile, block: int) -> BlockSizes:
    """Returns the sizes of a block, and those of the tensors outside the blocks."""
    sizes = {name: _number(file, key, block) for name, key in COUNTS.items()}
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and tokens:
        sizes["vocabulary"] = len(tokens)
    sizes["hidden"] = hidden = _number(file, "embedding_length", block)
    sizes["all layer widths"] = _number(file, "block_count", block) * sizes["layer width"]
    return sizes | _of_attention(file, block, hidden, sizes) | _of_mlp(file, block, hidden) | _of_states(file, sizes)


def _number(file: OpenFile, key: str, block: int, otherwise: float = nan) -> float:
    """Returns a size by its key; of an array with one number for each block, this block's."""
    value: Any = file.get(key)
    if isinstance(value, list):
        value = value[block] if block < len(value) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else otherwise


def _of_attention(file: OpenFile, block: int, hidden: float, sizes: BlockSizes) -> BlockSizes:
    heads = _number(file, "attention.head_count", block)
    keys = _number(file, KEY_HEADS, block, heads)
    end = _ending(file, block)
    width = _number(file, f"attention.key_length{end}", block, hidden // heads if heads else nan)
    values = _number(file, f"attention.value_length{end}", block, width)
    whole = _number(file, "attention.key_length_mla", block, width)
    whole_values = _number(file, "attention.value_length_mla", block, values)
    gates = 2 if any(entry.gated for entry in file.entries) else 1
    return {
        "heads": heads,
        "width": width,
        "queries": heads * width,
        "queries and gates": gates * heads * width,
        "keys": keys * width,
        "values": keys * values,
        "all heads": heads * width + keys * (width + values),
        "attended": heads * values,
        "whole queries": heads * whole,
        "whole values": whole_values,
        "whole attended": heads * whole_values,
        "unrotated": whole - sizes["rotated"],
        "keys and values": heads * (whole - sizes["rotated"] + whole_values),
        "rank and rotated": sizes["rank"] + sizes["rotated"],
        "half rotated": sizes["rotated"] / 2,
        "outputs": sizes["output groups"] * sizes["output rank"],
        "group": heads * values / (sizes["output groups"] or nan),
        "index queries": sizes["index heads"] * sizes["index width"],
    }


def _ending(file: OpenFile, block: int) -> str:
    """Returns the ending of the keys of a block's head sizes: blocks with a window may have sizes of their own."""
    pattern = file.get(WINDOW_PERIOD)
    has_window = isinstance(pattern, list) and block < len(pattern) and bool(pattern[block])
    return "_swa" if has_window and file.get("attention.key_length_swa") is not None else ""


def _of_mlp(file: OpenFile, block: int, hidden: float) -> BlockSizes:
    mlp = _number(file, "feed_forward_length", block)
    expert = mlp if file.architecture in BY_MLP else _number(file, "expert_feed_forward_length", block, mlp)
    shared = _number(file, "expert_shared_count", block, 1) * expert
    return {
        "mlp": mlp,
        "gate and up": 2 * mlp,
        "expert": expert,
        "shared": _number(file, "expert_shared_feed_forward_length", block, shared),
        "expert inputs": _number(file, "moe_latent_size", block, hidden) or hidden,
    }


def _of_states(file: OpenFile, sizes: BlockSizes) -> BlockSizes:
    """Returns the sizes of state spaces and of other modules without attention, and of streams of hidden states."""
    groups, hidden, streams = _number(file, "ssm.group_count", 0), sizes["hidden"], sizes["streams"]
    inner, steps, mixed = sizes["inner"], sizes["steps"], sizes["inner"] + 2 * groups * sizes["state"]
    return {
        "groups": groups,
        "mixed": mixed,
        "twice inner": 2 * inner,
        "inner and mixed": inner + mixed + steps,
        "steps and states": steps + 2 * sizes["state"],
        "twice steps": 2 * steps,
        "inner of a group": inner / (groups or nan),
        "inner of a step": inner / (steps or nan),
        "recurrent": _number(file, "attention.head_count", 0) * sizes["recurrent width"],
        "three hidden": 3 * hidden,
        "twice hidden": 2 * hidden,
        "further inputs": sizes["inputs"] - 1,
        "inputs squared": sizes["inputs"] ** 2,
        "all streams": streams * hidden,
        "mixing": streams**2 + 2 * streams,
        "twice width": 2 * _number(file, "attention.key_length", 0),
        "twice index width": 2 * sizes["index width"],
    }
