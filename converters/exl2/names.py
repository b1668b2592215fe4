"""ExLlamaV2's names for the tensors of a model.

ExLlamaV2 splits the fused linears of Phi-3, so one of our tensors can become several. It names Mixtral's experts as
their checkpoints do.
"""

from __future__ import annotations

import re
from itertools import accumulate, pairwise

from lqexport.converters.models.architecture import Architecture, Config, ExLlamaV2
from lqexport.converters.models.rope import head_dim
from lqexport.converters.models.tensor_names import block_module, head_count


def rules_of(architecture: Architecture) -> ExLlamaV2:
    """Returns ExLlamaV2's rules for an architecture; for one that it does not load, the rules of Llama."""
    return architecture.exl2 or ExLlamaV2()


def stored_names(architecture: Architecture, name: str) -> list[str]:
    """Returns the names under which a tensor's rows are stored, in the order of the rows.

    It is one name, or several for a fused linear.
    """
    rules, module = rules_of(architecture), block_module(architecture, name)
    if module is not None and module[2] == "weight" and module[1] in rules.split:
        return [name.replace(module[1], linear) for linear in rules.split[module[1]]]
    for pattern, new in rules.renamed.items():
        name = re.sub(pattern, new, name)
    return [name]


def pieces(architecture: Architecture, config: Config, name: str, rows: int) -> dict[str, tuple[int, int]]:
    """Returns stored name -> (first row, row behind the last) of the rows of a tensor that it holds."""
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
    # ExLlamaV2 heeds attention_bias of config.json only if its table has no attention linear with a bias.
    return bool(config.get("attention_bias")) and not any(linear.startswith("self_attn.") for linear in biased)
