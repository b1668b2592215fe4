"""Compares the settings of a file's config with the source's, those that change what a model computes."""

from __future__ import annotations

import contextlib
import math
from typing import Any

SETTINGS = ("eps", "rope", "rotary", "theta", "factor", "window", "softcap", "scal", "head", "multiplier", "per_tok",
            "layer_types", "norm_topk", "hidden_act")  # fmt: skip
"""Parts of the names of settings in config.json that change what a model computes."""
COUNTS = ("num_kv_heads",)
"""Settings that some configs hold beside others that decide, so that they may differ."""


def different_settings(file: dict[str, Any], source: dict[str, Any]) -> list[str]:
    """Returns one sentence for each setting that both configs hold, that changes the results and that differs."""
    ours, theirs = _settings(file), _settings(source)
    return [
        f"The file's config has {name} {ours[name]}, and the source's {theirs[name]}."
        for name in theirs
        if name in ours and not _equal(ours[name], theirs[name])
    ]


def _settings(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the settings of a config that change results, with those of rope under their own names."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            below = prefix if name in ("rope_parameters", "rope_scaling") else f"{prefix}{name}."
            found |= _settings(value, below) if prefix or "rope" in name else {}
        elif any(part in name for part in SETTINGS) and value is not None and name not in COUNTS:
            found[prefix + name] = value
    return found


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, (int, float)) and isinstance(theirs, (int, float)):
        with contextlib.suppress(OverflowError):  # of an integer that no float holds
            return math.isclose(ours, theirs, rel_tol=1e-5)  # GGUF stores float32
    return bool(ours == theirs)
