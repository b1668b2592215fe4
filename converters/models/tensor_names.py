"""Tensor names: which tensors a model has, in the order in which data flows, and their names in GGUF."""

from __future__ import annotations

import math
import re
from typing import Any

from lqexport.converters.models.architecture import CONVOLUTIONS, EACH, LENT, THREE_DIMENSIONAL, Architecture
from lqexport.errors import UserError

_EXPERT = re.compile(r"(^|\.)experts\.(\d+)\.")
_STACKED = re.compile(r"(?:^|\.)(?:experts|altup_projections|altup_unembed_projections)\.(\d+)\.")


def gguf_names(architecture: Architecture, layers: int) -> dict[str, str]:
    """Returns Hugging Face name -> GGUF name for every tensor that the architecture may have, in the model's order.

    Example: `model.layers.0.self_attn.q_proj.weight` -> `blk.0.attn_q.weight`. The experts of a block share one GGUF
    tensor, which holds them one after the other.
    """
    embedding, *after_blocks = architecture.gguf_top.items()
    blocks = [pair for layer in range(layers) for pair in block_names(architecture, layer).items()]
    return dict([embedding, *blocks, *after_blocks])


def block_names(architecture: Architecture, layer: int) -> dict[str, str]:
    """Returns Hugging Face name -> GGUF name for every tensor that a block may have."""
    names = {
        f"{module}.{end}": f"{gguf}.{end}"
        for module, gguf in architecture.modules_of(layer).items()
        for end in ("weight", "bias")
    } | architecture.tensors_of(layer)
    return {f"{architecture.blocks}.{layer}.{name}": f"blk.{layer}.{gguf}" for name, gguf in names.items()}


def needed_names(architecture: Architecture, layers: int) -> list[str]:
    """Returns the Hugging Face names of the tensors that every model of the architecture has, the output aside."""
    return [name for name in gguf_names(architecture, layers) if is_needed(architecture, name)]


def is_needed(architecture: Architecture, name: str) -> bool:
    """Returns whether every model of the architecture with that block has a tensor; False for the output."""
    module = block_module(architecture, name)
    is_lent = module is not None and module[1] in LENT
    if is_lent or name in (architecture.output, *architecture.projections):
        return False
    return not name.endswith(".bias") or _within_block(architecture, name) in architecture.gguf_tensors


def projection_shapes(architecture: Architecture, config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Returns name -> shape of the `projections` that a model has by its config.json."""
    shapes = {
        name: (config.get(rows), config.get(columns)) for name, (rows, columns) in architecture.projections.items()
    }
    return {name: (rows, columns) for name, (rows, columns) in shapes.items() if rows and columns}


def block_module(architecture: Architecture, name: str) -> tuple[int, str, str] | None:
    """Returns (layer, module, `weight` or `bias`) of a tensor of a decoder block, and None for any other tensor.

    Example: `model.layers.3.mlp.up_proj.weight` -> (3, "mlp.up_proj", "weight").
    """
    prefix = f"{architecture.blocks}."
    if not name.startswith(prefix):
        return None
    layer, _, rest = name.removeprefix(prefix).partition(".")
    if not layer.isdecimal() or len(layer) > 9:
        return None
    module, _, end = rest.rpartition(".")
    return int(layer), module, end


def expert_number(name: str) -> int | None:
    """Returns the number of the expert that a tensor belongs to; None for a tensor of no expert."""
    match = _EXPERT.search(name)
    return int(match[2]) if match else None


def place_in_stack(name: str) -> int | None:
    """Returns the place of a matrix among those that share a GGUF tensor: an expert's number, or that of a list of
    linears outside the blocks; None for a tensor of its own."""
    match = _STACKED.search(name)
    return int(match[1]) if match else None


def of_each_expert(name: str) -> str:
    """Returns a tensor's name with `*` in place of an expert's number."""
    return _EXPERT.sub(rf"\1experts.{EACH}.", name)


def is_linear(architecture: Architecture, name: str) -> bool:
    """Returns whether a tensor is a linear's weight in a decoder block that does not predict further tokens."""
    module = block_module(architecture, name)
    if module is None or module[2] != "weight" or architecture.predicts(module[0]):
        return False
    return module[1] in architecture.linear_names


def is_rounded(architecture: Architecture, name: str) -> bool:
    """Returns whether a tensor is a matrix in fewer bits than norms have, which the solver does not work on."""
    if name in (architecture.embedding, architecture.output, *architecture.tables, *architecture.projections):
        return True
    module = block_module(architecture, name)
    return module is not None and module[2] == "weight" and module[1] in architecture.rounded


def is_norm(name: str) -> bool:
    """Returns whether a tensor is the weight of a norm."""
    return name.endswith("norm.weight")


def plain_codec(architecture: Architecture, name: str, type_name: str | None = None) -> str:
    """Returns the codec in which GGUF holds a tensor that is no matrix.

    It is `gguf:F32`, one that changes the tensor's values, or that of whole numbers.

    type_name   the tensor's GGUF type in a file; None for the one that it gets. Only F32 has codecs that change values
    """
    within = _within_block(architecture, name)
    if within in architecture.whole:
        return f"gguf-whole:{type_name or 'I32'}"
    type_name = type_name or "F32"
    if within in architecture.decays:
        return f"gguf-decay:{type_name}"
    if architecture.norm_plus and is_norm(name) and within.removesuffix(".weight") not in architecture.plain_norms:
        return f"gguf-norm:{type_name}"
    return f"gguf:{type_name}"


def gguf_shape(
    architecture: Architecture, config: dict[str, Any], name: str, shape: tuple[int, ...]
) -> tuple[int, ...]:
    """Returns the shape of a tensor in GGUF, rows first, from its shape in the model."""
    within = _within_block(architecture, name)
    if within in architecture.columns:
        return (*shape, 1)
    if within in architecture.grouped:
        groups = head_count(config, architecture.grouped[within])
        return (groups, shape[0] // groups, *shape[1:])
    if is_three_dimensional(architecture, name):
        return (shape[0], 1, shape[1])
    return shape


def model_shape(architecture: Architecture, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of a tensor in the model, from its shape in GGUF, rows first."""
    if is_grouped_matrix(architecture, name) or is_three_dimensional(architecture, name):
        return (math.prod(shape[:-1]), shape[-1])
    within = _within_block(architecture, name)
    return (math.prod(shape),) if within in architecture.columns or within in architecture.grouped else shape


def is_grouped_matrix(architecture: Architecture, name: str) -> bool:
    """Returns whether a tensor is a matrix that GGUF holds as [groups, rows, columns]."""
    within = _within_block(architecture, name)
    return within in architecture.grouped and architecture.is_matrix(within.removesuffix(".weight"))


def group_count(architecture: Architecture, config: dict[str, Any], name: str) -> int:
    """Returns the number of matrices as which GGUF holds a tensor, the experts of a block aside."""
    if not is_grouped_matrix(architecture, name):
        return 1
    return head_count(config, architecture.grouped[_within_block(architecture, name)])


def is_three_dimensional(architecture: Architecture, name: str) -> bool:
    """Returns whether a tensor is a matrix [channels, width] that GGUF holds as [channels, 1, width]."""
    module = block_module(architecture, name)
    return module is not None and architecture.gguf_block.get(module[1]) in THREE_DIMENSIONAL


def _within_block(architecture: Architecture, name: str) -> str:
    """Returns the name of a tensor of a block without the block's prefix; "" for any other tensor."""
    module = block_module(architecture, name)
    return f"{module[1]}.{module[2]}" if module else ""


def as_matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns [channels, width] for the weight [channels, 1, width] of a convolution over single channels.

    A number without a dimension is a vector of length 1, and so are four dimensions of which at most one is not 1.
    """
    if not shape or (len(shape) == 4 and max(shape) == math.prod(shape)):
        return (math.prod(shape),)
    return (shape[0], shape[2]) if len(shape) == 3 and shape[1] == 1 else shape


def checkpoint_shape(architecture: Architecture, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape that transformers stores a tensor in: a convolution's matrix is [channels, 1, width] there."""
    if (form := architecture.shaped.get(_within_block(architecture, name))) is not None:
        return tuple(shape[0] if size == -1 else size for size in form)
    module = block_module(architecture, name)
    is_convolution = module is not None and architecture.gguf_block.get(module[1]) in CONVOLUTIONS
    return (shape[0], 1, shape[1]) if is_convolution and len(shape) == 2 else shape


def is_tied(config: dict[str, Any]) -> bool:
    """Returns whether the model's output shares the embedding's weights."""
    return bool(config.get("tie_word_embeddings", False))


def head_count(config: dict[str, Any], key: str = "num_attention_heads") -> int:
    """Returns a head count of config.json; the number of key and value heads is by default that of query heads.

    Raises UserError if config.json gives no such number.
    """
    count = config.get(key) or config.get("num_attention_heads")
    if not isinstance(count, int) or count < 1:
        raise UserError(f"config.json gives no {key}.")
    return count
