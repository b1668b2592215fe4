"""config.json as ExLlamaV2 0.3.2 reads it (exllamav2/config.py), and what it computes otherwise than transformers,
known from config.json before any work."""

from __future__ import annotations

from lqexport.converters.exl2.names import rules_of
from lqexport.converters.gguf.support import check_fixed, window, window_period
from lqexport.converters.models.architecture import Architecture, Config
from lqexport.converters.models.rope import longrope_attention, rope_settings, window_theta
from lqexport.errors import UserError

ROPE_TYPES = ("default", "dynamic", "linear", "llama3", "longrope")
EXPERTS = (4, 8, 16, 128)
"""Numbers of experts that its kernel has."""
WINDOW_THETA = 1e4
"""`rope_theta` of the blocks with windows, where they have one of their own."""


def check_supported(architecture: Architecture, config: Config) -> None:
    """Raises UserError where ExLlamaV2 lacks the architecture or computes it in another way than config.json asks."""
    name = architecture.classes[0]
    if architecture.exl2 is None:
        raise UserError(f"EXL2 folders of {name} are not written. Choose another target.")
    check_fixed("ExLlamaV2", architecture, config)
    rope = rope_settings(config)
    if rope["rope_type"] not in ROPE_TYPES:
        raise UserError(f"ExLlamaV2 has no rope scaling of type {rope['rope_type']!r}, or another than transformers.")
    if rope["rope_type"] == "longrope" and longrope_attention(config) != longrope_attention(_unscaled(config)):
        raise UserError("ExLlamaV2 computes longrope without attention_factor and factor of config.json.")
    if architecture.experts and config[architecture.experts] not in EXPERTS:
        raise UserError(f"ExLlamaV2 runs {', '.join(map(str, EXPERTS))} experts, not {config[architecture.experts]}.")
    if window_period(architecture, config) and window_theta(config) not in (None, WINDOW_THETA):
        raise UserError(
            f"ExLlamaV2 rotates within windows with rope_theta {WINDOW_THETA:g}, not {window_theta(config)}."
        )


def _unscaled(config: Config) -> Config:
    """The same with the scale that follows from the lengths of the contexts."""
    rope = {key: value for key, value in rope_settings(config).items() if key not in ("attention_factor", "factor")}
    return config | {"rope_parameters": rope}


def exl2_config(architecture: Architecture, config: Config) -> Config:
    """A config.json with the keys that ExLlamaV2 knows beside those of transformers.

    Where it has no windows, the longest context that it offers is one window, within which both compute the same.
    """
    rules, rope = rules_of(architecture), rope_settings(config)
    scaled = rope["rope_type"] not in ("default", "dynamic")  # dynamic changes nothing within the usual context
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    found = config | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling if scaled else None}
    found |= {theirs: config[ours] for theirs, ours in rules.keys.items()}
    for key in ("partial_rotary_factor", "original_max_position_embeddings"):
        if rope.get(key) is not None:
            found[key] = rope[key]
    narrow = window(config)
    if narrow is None:
        found["sliding_window"] = None
    elif architecture.period is None:
        found["max_sequence_length"] = min(narrow, config["max_position_embeddings"])
    else:
        found["sliding_window_pattern"] = window_period(architecture, config)
    return found | ({"architectures": [rules.called]} if rules.called else {})
