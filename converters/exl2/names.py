"""ExLlamaV2's names for the tensors of a model.

ExLlamaV2 splits the fused linears of Phi-3, so one of our tensors can become several. It names Mixtral's experts as
their checkpoints do.
"""

from __future__ import annotations

from lqexport.converters.folders.pieces import Naming
from lqexport.converters.models.architecture import Architecture, Config, ExLlamaV2


def rules_of(architecture: Architecture) -> ExLlamaV2:
    """Returns ExLlamaV2's rules for an architecture; for one that it does not load, the rules of Llama."""
    return architecture.exl2 or ExLlamaV2()


def naming(architecture: Architecture) -> Naming:
    """Returns under which names ExLlamaV2's folders store the tensors of an architecture."""
    rules = rules_of(architecture)
    return Naming(rules.split, rules.renamed)


def wants_bias(architecture: Architecture, config: Config, module: str) -> bool:
    """Returns whether ExLlamaV2 adds a bias to a linear of a block."""
    biased = rules_of(architecture).biased
    if module in biased or not module.startswith("self_attn."):
        return module in biased or bool(config.get("mlp_bias"))
    # ExLlamaV2 heeds attention_bias of config.json only if its table has no attention linear with a bias.
    return bool(config.get("attention_bias")) and not any(linear.startswith("self_attn.") for linear in biased)
