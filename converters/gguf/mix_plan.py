"""Gives the tensors of a model the types that one of llama.cpp's mixes has for them (`mixes`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lqexport.converters.gguf.mixes import MIXES, SMALLEST, Layer, mix_embedding, mix_output, mix_type, sort_of
from lqexport.converters.models.architecture import KEY_HEADS, Architecture
from lqexport.converters.models.tensor_names import gguf_names, head_count, is_linear, is_rounded, is_tied


def mix_types(
    mix: str, architecture: Architecture, config: dict[str, Any], columns: Mapping[str, int], layers: int
) -> dict[str, str]:
    """Returns the type of each matrix, by its Hugging Face name, in one of `MIXES`, before any fallback.

    columns   number of columns of the model's matrices, by name; those beyond the first `layers` blocks get no type
    layers    number of decoder blocks
    """
    renamed = gguf_names(architecture, layers)
    matrices = [name for name in columns if is_linear(architecture, name) or is_rounded(architecture, name)]
    in_blocks = {name: renamed[name] for name in matrices if renamed.get(name, "").startswith("blk.")}
    types = _block_types(mix, architecture, config, in_blocks, layers)
    for name in matrices:
        if name in architecture.projections:
            types[name] = MIXES[mix]
        elif name in renamed and name not in in_blocks:
            separate = name == architecture.embedding and not is_tied(config)
            types[name] = mix_embedding(mix) if separate else mix_output(mix, str(architecture.gguf), columns[name])
    return types


def _block_types(
    mix: str, architecture: Architecture, config: dict[str, Any], matrices: dict[str, str], layers: int
) -> dict[str, str]:
    """Returns the types of the blocks' matrices.

    matrices   Hugging Face name -> GGUF name, such as `blk.0.attn_q.weight`
    """
    experts = config.get(architecture.experts, 0) if architecture.experts else 0
    queries_per_key = _queries_per_key(architecture, config)
    positions, counts = _positions(matrices.values())
    types = {}
    for name, gguf_name in matrices.items():
        block, module = _parts(gguf_name)
        values = sort_of(module) == "attn_v"
        # In a mixture of experts, most rules go by the number of the block.
        index = block if experts > 1 and mix not in SMALLEST and not values else positions[gguf_name]
        # Of all but values, llama.cpp takes that each block has one.
        count = counts["attn_v"] if values and not architecture.fills else layers
        layer = Layer(str(architecture.gguf), index, count, queries_per_key, experts)
        types[name] = mix_type(mix, module, layer)
    return types


def _positions(gguf_names: Collection[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the number of each tensor among those of its sort, in llama.cpp's order, and how many of a sort there
    are."""
    counts: dict[str, int] = {}
    positions = {}
    for name in sorted(set(gguf_names), key=lambda name: (_parts(name)[0], name)):
        sort = sort_of(_parts(name)[1])
        positions[name] = counts.get(sort, 0)
        counts[sort] = positions[name] + 1
    return positions, counts


def _parts(gguf_name: str) -> tuple[int, str]:
    """Returns the number of the block and the module of a tensor's name: (3, `attn_q`) for `blk.3.attn_q.weight`."""
    _, block, module = gguf_name.removesuffix(".weight").split(".", 2)
    return int(block), module


def _queries_per_key(architecture: Architecture, config: dict[str, Any]) -> int:
    """Returns the number of query heads for each key head by which llama.cpp chooses types: that of the first block.

    It is 0 where the first block has no attention.
    """
    of_blocks = [key.config for key in architecture.keys if key.many and key.name == KEY_HEADS]
    keys = config[of_blocks[0]][0] if of_blocks else head_count(config, "num_key_value_heads")
    keys = 1 if architecture.absorbed and not of_blocks else keys
    return head_count(config) // keys if keys else 0
