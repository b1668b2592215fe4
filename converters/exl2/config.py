"""config.json as ExLlamaV2 0.3.2 reads it (exllamav2/config.py).

It also checks, before any work, that ExLlamaV2 computes a model as transformers does.
"""

from __future__ import annotations

from lqexport.converters.exl2.names import rules_of
from lqexport.converters.models.architecture import Architecture, Config
from lqexport.converters.models.engine_checks import check_fixed, check_window_scaling
from lqexport.converters.models.rope import former_rope, longrope_attention, rope_settings, window_theta
from lqexport.converters.models.windows import window, window_period
from lqexport.errors import UserError, with_advice

ROPE_TYPES = ("default", "dynamic", "linear", "llama3", "longrope")
EXPERTS = (4, 8, 16, 128)
"""The numbers of experts that ExLlamaV2's kernel supports."""
WINDOW_THETA = 1e4
"""`rope_theta` that ExLlamaV2 uses in blocks with a sliding window, where they have another than the other blocks."""


def check_supported(architecture: Architecture, config: Config) -> None:
    """Raises UserError if ExLlamaV2 lacks the architecture, or computes it in another way than config.json says."""
    with with_advice("Choose another target."):
        if architecture.exl2 is None:
            raise UserError(f"EXL2 folders of {architecture.classes[0]} are not written.")
        check_fixed("ExLlamaV2", architecture, config)
        _check_rope(architecture, config)
        if architecture.experts and config[architecture.experts] not in EXPERTS:
            raise UserError(
                f"ExLlamaV2 runs {', '.join(map(str, EXPERTS))} experts, not {config[architecture.experts]}."
            )


def _check_rope(architecture: Architecture, config: Config) -> None:
    rope = rope_settings(config)
    if rope["rope_type"] not in ROPE_TYPES:
        raise UserError(
            f"ExLlamaV2 has no rope scaling of type {rope['rope_type']!r}, or computes it otherwise than transformers."
        )
    if rope["rope_type"] == "longrope" and longrope_attention(config) != longrope_attention(_unscaled(config)):
        raise UserError("ExLlamaV2 computes longrope without attention_factor and factor of config.json.")
    if window_period("ExLlamaV2", architecture, config) and window_theta(config) not in (None, WINDOW_THETA):
        raise UserError(
            f"ExLlamaV2 rotates within windows with rope_theta {WINDOW_THETA:g}, not {window_theta(config)}."
        )
    if architecture.period is not None:
        check_window_scaling("ExLlamaV2", architecture, config)


def _unscaled(config: Config) -> Config:
    """Returns the config without longrope's explicit scale, which then follows from the lengths of the contexts."""
    rope = {key: value for key, value in rope_settings(config).items() if key not in ("attention_factor", "factor")}
    return config | {"rope_parameters": rope, "rope_scaling": None}


def exl2_config(architecture: Architecture, config: Config) -> Config:
    """Returns config.json with ExLlamaV2's keys added to those of transformers.

    Where ExLlamaV2 ignores the architecture's sliding windows, its longest context is set to one window. Within one
    window, ExLlamaV2 and transformers compute the same.
    """
    rules, rope = rules_of(architecture), rope_settings(config)
    extended = config | former_rope(config)
    extended |= {exl2_key: config[key] for exl2_key, key in rules.keys.items()}
    for key in ("partial_rotary_factor", "original_max_position_embeddings"):
        if rope.get(key) is not None:
            extended[key] = rope[key]
    narrow = window(config)
    if narrow is None:
        extended["sliding_window"] = None
    elif architecture.period is None:
        extended["max_sequence_length"] = min(narrow, config["max_position_embeddings"])
    else:
        extended["sliding_window_pattern"] = window_period("ExLlamaV2", architecture, config)
    return extended | ({"architectures": [rules.called]} if rules.called else {})
