"""Tensor names: which tensors a model has, in the order in which data flows, and what GGUF calls them."""

from __future__ import annotations

import re
from typing import Any

from lqexport.converters.models.architecture import EACH, Architecture
from lqexport.errors import UserError

_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def gguf_names(architecture: Architecture, layers: int) -> dict[str, str]:
    """Hugging Face name -> GGUF name of every tensor that the architecture may have, in the order of the model.

    Example: `model.layers.0.self_attn.q_proj.weight` -> `blk.0.attn_q.weight`. The experts of a block share one GGUF
    tensor, in which they lie one after the other.
    """
    embedding, *others = architecture.gguf_top.items()
    blocks = [
        (f"{architecture.blocks}.{layer}.{name}", f"blk.{layer}.{gguf}")
        for layer in range(layers)
        for module, known in architecture.modules_of(layer).items()
        for name, gguf in _tensors(module, known)
    ]
    return dict([embedding, *blocks, *others])


def _tensors(module: str, gguf: str) -> list[tuple[str, str]]:
    """Those of a module, or the one that is named itself."""
    kinds = ("weight", "bias")
    return [(module, gguf)] if gguf.endswith(".bias") else [(f"{module}.{kind}", f"{gguf}.{kind}") for kind in kinds]


def needed_names(architecture: Architecture, layers: int) -> list[str]:
    """The Hugging Face names of `gguf_names` that no model of the architecture lacks; the output is not among them."""
    names = [name for name in gguf_names(architecture, layers) if not name.endswith(".bias")]
    return [name for name in names if name != architecture.output]


def block_module(architecture: Architecture, name: str) -> tuple[int, str, str] | None:
    """(layer, module, `weight` or `bias`) of a tensor of a decoder block, None for any other.

    Example: `model.layers.3.mlp.up_proj.weight` -> (3, "mlp.up_proj", "weight").
    """
    prefix = f"{architecture.blocks}."
    if not name.startswith(prefix):
        return None
    layer, _, rest = name.removeprefix(prefix).partition(".")
    if not layer.isdecimal() or len(layer) > 9:
        return None
    module, _, kind = rest.rpartition(".")
    return int(layer), module, kind


def expert_number(name: str) -> int | None:
    """Which of its block's experts a tensor belongs to, None where it is of none."""
    found = _EXPERT.search(name)
    return int(found[1]) if found else None


def of_each_expert(name: str) -> str:
    """A name with `*` for the number of the expert, where it has one."""
    return _EXPERT.sub(f".experts.{EACH}.", name)


def is_linear(architecture: Architecture, name: str) -> bool:
    """Whether a tensor is the weight of a linear of a decoder block."""
    module = block_module(architecture, name)
    return module is not None and module[2] == "weight" and any(module[1] in group for group in architecture.linears)


def is_norm(name: str) -> bool:
    """Whether a tensor is the weight of a norm."""
    return name.endswith("norm.weight")


def is_tied(config: dict[str, Any]) -> bool:
    """Whether the model's output shares the embedding's weights."""
    return bool(config.get("tie_word_embeddings", False))


def head_count(config: dict[str, Any], key: str = "num_attention_heads") -> int:
    """A head count of config.json; models without grouped queries need not give that of keys and values."""
    count = config.get(key) or config.get("num_attention_heads")
    if not isinstance(count, int) or count < 1:
        raise UserError(f"config.json gives no {key}.")
    return count
