"""Compares which blocks have a module with what the metadata say of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lqexport.checking.opened import OpenFile
from lqexport.checking.problems import Problem, error
from lqexport.converters.models.architecture import KEY_HEADS
from lqexport.errors import listed


@dataclass(frozen=True)
class Rule:
    """Which blocks have a tensor.

    tensor   its name within a block
    key      the key of the architecture that says so
    has      returns whether the block with a number has it
    """

    tensor: str
    key: str
    has: Callable[[int], bool]


def check_presence(file: OpenFile) -> Iterator[Problem]:
    """Yields the tensors that blocks have against the metadata, or lack. Blocks that predict further tokens are not
    looked at."""
    blocks = (file.count("block_count") or 0) - (file.count("nextn_predict_layers") or 0)
    for rule in _rules(file):
        names = [f"blk.{block}.{rule.tensor}" for block in range(min(blocks, len(file.tensors)))]
        wrong = [name for block, name in enumerate(names) if (name in file.tensors) != rule.has(block)]
        if wrong:
            said = f"{file.architecture}.{rule.key} is {file.get(rule.key)!r}"
            sentence = f"{said}, and {len(wrong)} blocks are not so: {listed(wrong, 3)}."
            yield error("tensors", sentence, unless_loaded=True)


def _rules(file: OpenFile) -> Iterator[Rule]:
    """Yields the rules for the keys that a file has, in an architecture of which we have an entry."""
    if not file.entries:
        return
    if every := file.count("full_attention_interval"):
        yield Rule("attn_q.weight", "full_attention_interval", lambda block: (block + 1) % every == 0)
    if isinstance(hashed := file.get("hash_layer_count"), int):
        yield Rule("ffn_gate_tid2eid.weight", "hash_layer_count", lambda block: block < hashed)
    if isinstance(types := file.get("attention.indexer.types"), list):
        yield Rule("indexer.proj.weight", "attention.indexer.types", lambda block: any(types[block : block + 1]))
    keys, of_keys = file.get(KEY_HEADS), "attn_kv_a_mqa" if any(entry.latent for entry in file.entries) else "attn_k"
    if isinstance(keys, list) and 0 in keys:
        yield Rule(f"{of_keys}.weight", KEY_HEADS, lambda block: any(keys[block : block + 1]))
    leading = file.get("leading_dense_block_count")
    first, step = leading or 0, file.get("interleave_moe_layer_step")
    if not file.count("expert_count"):
        return
    if isinstance(step, int):
        yield Rule("ffn_down_exps.weight", "interleave_moe_layer_step",
                   lambda block: step > 0 and block >= first and (block + 1) % step == 0)  # fmt: skip
    elif isinstance(leading, int):
        yield Rule("ffn_down_exps.weight", "leading_dense_block_count", lambda block: block >= leading)
