"""What ExLlamaV2 calls the tensors of a model, and which of them hold a part of one of ours: it keeps apart what Phi-3
fuses, and calls Mixtral's experts as their checkpoints do."""

from __future__ import annotations

import re
from itertools import accumulate, pairwise

from lqexport.converters.models.architecture import Architecture, Config, ExLlamaV2
from lqexport.converters.models.rope import head_dim
from lqexport.converters.models.tensor_names import block_module, head_count


def rules_of(architecture: Architecture) -> ExLlamaV2:
    """What ExLlamaV2 says of an architecture; of one that it does not load, what it says of Llama."""
    return architecture.exl2 or ExLlamaV2()


def stored_names(architecture: Architecture, name: str) -> list[str]:
    """The names under which a tensor's rows are stored, in their order: one, or several of a fused linear."""
    rules, place = rules_of(architecture), block_module(architecture, name)
    if place is not None and place[2] == "weight" and place[1] in rules.split:
        return [name.replace(place[1], part) for part in rules.split[place[1]]]
    for pattern, new in rules.renamed.items():
        name = re.sub(pattern, new, name)
    return [name]


def pieces(architecture: Architecture, config: Config, name: str, rows: int) -> dict[str, tuple[int, int]]:
    """Stored name -> the first row of a tensor that it holds, and the one behind the last."""
    names = stored_names(architecture, name)
    counts = [rows // len(names)] * len(names)
    if len(names) == 3:  # queries, keys and values
        keys = head_dim(config) * head_count(config, "num_key_value_heads")
        counts = [rows - 2 * keys, keys, keys]
    return dict(zip(names, pairwise(accumulate(counts, initial=0)), strict=True))


def wants_bias(architecture: Architecture, config: Config, module: str) -> bool:
    """Whether ExLlamaV2 adds a bias to a linear of a block."""
    biased = rules_of(architecture).biased
    if module in biased or not module.startswith("self_attn."):
        return module in biased or bool(config.get("mlp_bias"))
    # It heeds config.json where its table says nothing of any part of the attention.
    return bool(config.get("attention_bias")) and not any(other.startswith("self_attn.") for other in biased)
