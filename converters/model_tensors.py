"""The tensors of a checkpoint that a converter stores, checked against the architecture and config.json."""

from __future__ import annotations

import re
from typing import Any

from lqexport.converters.gguf.row_order import row_order
from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.further import further_blocks, is_beyond, is_further_matrix
from lqexport.converters.models.tensor_names import (
    block_module,
    gguf_names,
    is_linear,
    is_rounded,
    is_tied,
    needed_names,
)
from lqexport.converters.plan import Shapes
from lqexport.errors import UserError, listed


def model_tensors(
    architecture: Architecture, config: dict[str, Any], shapes: Shapes, *, further: bool = False
) -> Shapes:
    """Returns name -> shape of the tensors to store, in the order of the model.

    further   whether to store blocks that predict further tokens. Those that lack a tensor are left out

    Raises UserError if a tensor is unknown or missing, or if a shape does not fit config.json.
    """
    blocks = block_count(config) + (further_blocks(architecture, block_count(config), shapes) if further else 0)
    known = gguf_names(architecture, blocks)
    unknown = [name for name in shapes if name not in known and not _is_unused(architecture, config, name)]
    if unknown:
        raise UserError(
            f"The model has tensors that {architecture.classes[0]} with num_hidden_layers={blocks} lacks: "
            f"{listed(unknown)}. Its config.json may be that of another model."
        )
    unneeded = {architecture.output} if is_tied(config) else set()
    needed = [*needed_names(architecture, blocks), architecture.output]
    missing = [name for name in needed if name not in shapes and name not in unneeded]
    if missing:
        hint = " If the output is the embedding, config.json must say tie_word_embeddings: true."
        raise UserError(f"The model has no tensor {listed(missing)}.{hint if missing == [architecture.output] else ''}")
    kept = {name: tuple(shapes[name]) for name in known if name in shapes and name not in unneeded}
    for name, shape in kept.items():
        _check_shape(architecture, config, name, shape)
    return kept


def block_count(config: dict[str, Any]) -> int:
    """Returns the number of decoder blocks by config.json. Raises UserError if it gives none."""
    layers = config.get("num_hidden_layers")
    if not isinstance(layers, int) or layers < 1:
        raise UserError("config.json gives no num_hidden_layers.")
    return layers


def _check_shape(architecture: Architecture, config: dict[str, Any], name: str, shape: tuple[int, ...]) -> None:
    if 0 in shape:
        raise UserError(f"{name} is empty: its shape is {list(shape)}.")
    vector = name.endswith(("norm.weight", ".bias"))
    matrix = any(holds(architecture, name) for holds in (is_linear, is_rounded, is_further_matrix))
    if (vector or matrix) and len(shape) != (1 if vector else 2):
        raise UserError(f"{name} should have {1 if vector else 2} dimensions, but its shape is {list(shape)}.")
    try:
        row_order(architecture, config, name, shape[0])
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _is_unused(architecture: Architecture, config: dict[str, Any], name: str) -> bool:
    """Returns whether a checkpoint's tensor is ignored, such as the rotary frequencies that old checkpoints store."""
    if any(re.search(pattern, name) for pattern in architecture.unused):
        return True
    module = block_module(architecture, name)
    borrowed = module is not None and architecture.is_borrowed(*module[:2])
    return borrowed or is_beyond(architecture, block_count(config), name)
