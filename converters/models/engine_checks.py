"""Checks that a program computes a model as its config.json says: those that llama.cpp, ExLlamaV2 and others share."""

from __future__ import annotations

from typing import Any

from lqexport.converters.models.architecture import Architecture, Config
from lqexport.converters.models.hf_defaults import FULL, SLIDING, default_rope
from lqexport.converters.models.windows import window
from lqexport.errors import UserError

SAME_ACTIVATIONS = {"swish": "silu", "gelu_python": "gelu", "gelu_new": "gelu_pytorch_tanh"}
SAME_ACTIVATIONS |= {"gelu_fast": "gelu_pytorch_tanh", "gelu_python_tanh": "gelu_pytorch_tanh"}
"""transformers' other names of an activation (`ACT2FN`), and the usual one."""


def check_fixed(engine: str, architecture: Architecture, config: Config) -> None:
    """Raises UserError if config.json has a value that is not among the architecture's `fixed` ones, or not `same`.

    engine   name of the program that runs the model, for the message
    """
    for key, allowed in architecture.fixed.items():
        if key in config and not _is_allowed(config[key], allowed):
            untied = key == "tie_word_embeddings" and not config[key]
            given = "the model's output is not its embedding" if untied else f"config.json has {config[key]!r}"
            raise UserError(
                f"{engine} computes {architecture.classes[0]} with {key} {alternatives(allowed)}, and {given}."
            )
    for key, other in architecture.same.items():
        if config.get(key) not in (None, config.get(other)):
            raise UserError(
                f"{engine} computes {architecture.classes[0]} with {key} equal to {other}, and config.json has "
                f"{config[key]!r} and {config.get(other)!r}."
            )


def _is_allowed(value: Any, allowed: tuple[Any, ...]) -> bool:
    names = {SAME_ACTIVATIONS.get(each, each) for each in allowed if isinstance(each, str)}
    return value in allowed or (isinstance(value, str) and SAME_ACTIVATIONS.get(value, value) in names)


def alternatives(allowed: tuple[Any, ...]) -> str:
    """Returns the values as a message lists them, with `or` between."""
    return " or ".join(repr(value) for value in allowed)


def check_without_windows(engine: str, architecture: Architecture, config: Config) -> None:
    """Raises UserError if the context is longer than a sliding window, for a program that ignores windows.

    engine   name of the program that runs the model, for the message
    """
    narrow, context = window(config), config.get("max_position_embeddings")
    if narrow is not None and (context is None or context > narrow):
        raise UserError(
            f"{engine} computes {architecture.classes[0]} without sliding windows, and by config.json each has "
            f"{narrow} of {context} tokens."
        )


def check_window_scaling(engine: str, architecture: Architecture, config: Config) -> None:
    """Raises UserError if blocks with a sliding window have rope scaling, or if it is not said for which blocks it is.

    engine   name of the program that runs the model, for the message
    """
    rope = config.get("rope_parameters") or {}
    window_type = (rope.get(SLIDING) or {}).get("rope_type", "default")
    if window_type != "default":
        raise UserError(f"{engine} has no rope scaling within windows, and config.json has {window_type!r}.")
    # transformers ignores such settings of these models.
    if rope and SLIDING in default_rope(architecture) and not rope.keys() & {FULL, SLIDING}:
        raise UserError(f"rope_parameters of config.json must have settings of {FULL} and {SLIDING}, not {rope}.")
