"""Compares the settings of a file's config with the source's, those that change what a model computes."""

from __future__ import annotations

import contextlib
import math
from typing import Any

from lqexport.converters.gguf.metadata import context_length
from lqexport.converters.models.architectures import architecture_of, find_architecture

SETTINGS = ("eps", "rope", "rotary", "theta", "factor", "window", "softcap", "scal", "head", "multiplier", "per_tok",
            "layer_types", "norm_topk", "hidden_act")  # fmt: skip
"""Parts of the names of settings in config.json that change what a model computes.

So does whatever else of config.json llama.cpp gets as metadata (`Architecture.keys`)."""
ROPE = ("rope_parameters", "rope_scaling")
"""The settings in config.json that hold those of rope."""
ORIGINAL = "original_max_position_embeddings"
"""The setting of rope that decides with YARN and LONGROPE. Of `llama3`, GGUF holds what follows from it alone."""
COUNTS = ("num_kv_heads",)
"""Settings that some configs hold beside others that decide, so that they may differ."""


def different_settings(file: dict[str, Any], source: dict[str, Any]) -> list[str]:
    """Returns one sentence for each setting that both configs hold, that changes the results and that differs."""
    architecture = find_architecture(source)
    keys = architecture.keys if architecture else ()
    defaults = {key.config: key.default for key in keys if key.default is not None and not key.rope}
    in_gguf = frozenset(key.config for key in keys)
    ours, theirs = _settings(file, in_gguf), _settings(defaults | source, in_gguf)
    return [
        f"The file's config has {name} {ours[name]}, and the source's {theirs[name]}."
        for name in theirs
        if name in ours and not _equal(ours[name], theirs[name])
    ]


def lost_settings(file: dict[str, Any], source: dict[str, Any]) -> list[str]:
    """Returns one sentence for each setting that the file should have by the source's config, and does not."""
    architecture, lost = architecture_of(source), []
    context, given = context_length(architecture, source), file.get("max_position_embeddings")
    if isinstance(given, int) and given < context:
        lost.append(f"The file's config has max_position_embeddings {given}, and the source's context has {context}.")
    multiplier = "mscale_all_dim"
    if architecture.mscale and _settings(source).get(multiplier) and not _settings(file).get(multiplier):
        lost.append(f"The file's config has no {multiplier}, and the source's has {_settings(source)[multiplier]}.")
    return lost


def _settings(
    config: dict[str, Any], in_gguf: frozenset[str] = frozenset(), prefix: str = "", in_rope: bool = False
) -> dict[str, Any]:
    """Returns the settings of a config that change results, with those of rope under their own names.

    in_gguf   names that count beside those of SETTINGS

    Settings of rope for one type of blocks get its name before theirs: `full_attention.rope_theta`.
    """
    settings: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            if name in ROPE or in_rope:
                settings |= _settings(value, in_gguf, prefix if name in ROPE else f"{prefix}{name}.", True)
        elif value is not None and name not in COUNTS and _counts(name, in_gguf, config):
            # Within the context, `dynamic` changes nothing.
            settings[prefix + name] = "default" if (name, value) == ("rope_type", "dynamic") else value
    return settings


def _counts(name: str, in_gguf: frozenset[str], config: dict[str, Any]) -> bool:
    """Returns whether a setting of a config, or of its rope, changes results."""
    if name == ORIGINAL:
        return config.get("rope_type") in ("yarn", "longrope")
    return name in in_gguf or any(part in name for part in SETTINGS)


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, (int, float)) and isinstance(theirs, (int, float)):
        with contextlib.suppress(OverflowError):  # of an integer that no float holds
            return math.isclose(ours, theirs, rel_tol=1e-5)  # GGUF stores float32
    return bool(ours == theirs)
