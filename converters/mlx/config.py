"""config.json as mlx-lm reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from lqexport.converters.mlx.types import in_half, settings
from lqexport.converters.models.architecture import Architecture, Config
from lqexport.converters.models.architectures import architecture_of, normalized
from lqexport.converters.models.rope import former_rope, head_dim, rope_settings, window_theta
from lqexport.converters.models.tensor_names import is_tied
from lqexport.converters.models.windows import window_period


def mlx_config(config: Config, modules: Mapping[str, str]) -> Config:
    """Returns config.json with the keys that mlx-lm reads, and with `quantization`.

    modules   quantized module, by its path in mlx-lm's model -> its codec

    `quantization` has the settings of most modules, and by path those of the others.
    """
    dtype = "float16" if in_half(config) else "bfloat16"
    extended = config | _former(architecture_of(config), normalized(config), config)
    extended |= {"dtype": dtype, "torch_dtype": dtype}
    usual = Counter(modules.values()).most_common(1)[0][0]
    apart = {path: settings(codec_name) for path, codec_name in modules.items() if codec_name != usual}
    quantization: dict[str, Any] = settings(usual) | apart
    return extended | {"quantization": quantization, "quantization_config": quantization}


def _former(architecture: Architecture, usual: Config, config: Config) -> Config:
    """Returns the settings that transformers 5 does not write any more, or elsewhere, and that mlx-lm reads.

    usual   the config with the usual names of keys

    mlx-lm gives settings that are missing other defaults than transformers.
    """
    former = former_rope(usual) | {"tie_word_embeddings": is_tied(usual)}
    if scaling := former["rope_scaling"]:
        former["rope_scaling"] = scaling | {"type": scaling["rope_type"]}
    if (share := rope_settings(usual).get("partial_rotary_factor")) is not None:
        former |= {"partial_rotary_factor": share}
        former |= (
            {"rotary_pct": share, "rotary_emb_base": former["rope_theta"]} if "gpt_neox" in config["model_type"] else {}
        )
    if (theta := window_theta(usual)) is not None:
        former["rope_local_base_freq"] = theta
    if not architecture.latent and not usual.get("head_dim"):
        former["head_dim"] = head_dim(usual)
    if architecture.period is not None and (period := window_period("mlx-lm", architecture, usual)):
        former["sliding_window_pattern"] = period
    if (count := usual.get("num_local_experts")) is not None:
        former["num_experts"] = count
    if "n_positions" in config:
        former["n_ctx"] = config["n_positions"]
    return former
