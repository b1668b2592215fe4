"""Blocks that predict further tokens (multi-token prediction, MTP): their numbers, names and shapes.

They follow the decoder blocks. llama.cpp reads them as blocks like these, and drafts tokens with them. The model alone
does not run them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from itertools import count
from typing import Any

from lqexport.converters.models.architecture import FURTHER_COUNT, Architecture, Config
from lqexport.converters.models.hf_defaults import SLIDING
from lqexport.converters.models.tensor_names import block_module, block_names, is_needed

NAMED = r"^(model\.)?mtp[._]"
"""A regular expression for their tensors where these have names of their own."""
_OF_BLOCK = re.compile(r"^(?:model\.)?mtp\.layers\.(\d{1,4})\.")
_BESIDE_BLOCKS = {"fc": "eh_proj", "pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm",
                  "norm": "shared_head.norm"}  # fmt: skip
"""Qwen's names of the modules of `predictor` -> DeepSeek's."""


def block_count(config: Config) -> int:
    """Returns the number of all blocks of a config.json: decoder blocks, and those that predict further tokens."""
    return int(config["num_hidden_layers"]) + int(config.get(FURTHER_COUNT) or 0)


def further_blocks(architecture: Architecture, layers: int, names: Collection[str]) -> int:
    """Returns how many whole blocks that predict further tokens a model has; 0 where llama.cpp knows none.

    layers   number of decoder blocks
    names    names of the model's tensors
    """
    if not architecture.predictor:
        return 0
    present = set(names)
    return next(number for number in count() if not _needed(architecture, layers + number) <= present)


def _needed(architecture: Architecture, block: int) -> set[str]:
    """Returns the names of the tensors that a block which predicts further tokens must have."""
    return {name for name in block_names(architecture, block) if is_needed(architecture, name)}


def is_further(architecture: Architecture, name: str) -> bool:
    """Returns whether a tensor is of a block that predicts further tokens."""
    module = block_module(architecture, name)
    return module is not None and architecture.predicts(module[0])


def is_beyond(architecture: Architecture, layers: int, name: str) -> bool:
    """Returns whether a checkpoint's tensor is of such a block, by its name alone: also where llama.cpp knows none.

    layers   number of decoder blocks
    """
    module = block_module(architecture, name)
    return bool(re.match(NAMED, name)) or (architecture.further and module is not None and module[0] >= layers)


def is_further_matrix(architecture: Architecture, name: str) -> bool:
    """Returns whether a tensor is a matrix of such a block that is stored in fewer bits than norms."""
    module = block_module(architecture, name)
    if module is None or module[2] != "weight" or not architecture.predicts(module[0]):
        return False
    matrices = {name for name in architecture.predictor if not name.endswith("norm")}
    return module[1] in matrices or architecture.is_matrix(module[1])


def renaming(architecture: Architecture, layers: Any, names: Collection[str]) -> dict[str, str]:
    """Returns regular expression -> replacement; together they turn Qwen's names of such blocks into those of others.

    layers   `num_hidden_layers` of config.json
    names    the checkpoint's names
    """
    if not architecture.predictor or not isinstance(layers, int):
        return {}
    numbers = sorted({int(match[1]) for name in names if (match := _OF_BLOCK.match(name))})
    of_blocks = {
        rf"^(model\.)?mtp\.layers\.{number}\.": f"{architecture.blocks}.{layers + number}." for number in numbers
    }
    beside = {
        rf"^(model\.)?mtp\.{module}\.": f"{architecture.blocks}.{layers}.{usual}."
        for module, usual in _BESIDE_BLOCKS.items()
    }
    return of_blocks | beside


def further_shapes(
    architecture: Architecture, config: Config, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors of blocks that predict further tokens, as many as config.json says.

    shapes   those of the model without such blocks
    """
    if not architecture.predictor:
        return {}
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    by_end = {
        f"{module[1]}.{module[2]}": shapes[name]
        for name in _windows_last(architecture, config, shapes)
        if (module := block_module(architecture, name))
    }
    for whole, parts in architecture.joins.items():
        stacked = [by_end[f"{part}.weight"] for part in parts]
        by_end[f"{whole}.weight"] = (sum(shape[0] for shape in stacked), stacked[0][1])
    norms = {f"{module}.weight": (hidden,) for module in architecture.predictor if module.endswith("norm")}
    by_end |= norms | {"eh_proj.weight": (hidden, 2 * hidden)}
    names = [name for block in range(layers, block_count(config)) for name in sorted(_needed(architecture, block))]
    return {name: by_end[name.split(f"{architecture.blocks}.")[1].partition(".")[2]] for name in names}


def _windows_last(architecture: Architecture, config: Config, names: Collection[str]) -> list[str]:
    """Returns names of tensors, those of blocks with a sliding window last if blocks that predict further have one."""
    types = config["layer_types"] if SLIDING in architecture.predicts_like else []
    blocks = {name: module[0] for name in names if types and (module := block_module(architecture, name))}
    return sorted(names, key=lambda name: name in blocks and types[blocks[name]] == SLIDING)
