"""Architectures: dots, of rednote."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import Config
from lqexport.converters.models.families.glm import GLM4_MOE_NORMED
from lqexport.converters.models.hf_defaults import FULL, SLIDING


def _windows(config: Config) -> Config:
    """Returns the types of the blocks where config.json does not give them, as transformers' config class does."""
    first = config.get("max_window_layers", 0)
    layers = range(config.get("num_hidden_layers", 0))
    types = [SLIDING if config.get("sliding_window") is not None and layer >= first else FULL for layer in layers]
    return {} if config.get("layer_types") else {"layer_types": types}


DOTS1 = replace(
    GLM4_MOE_NORMED,
    family="dots.llm1",
    classes=("Dots1ForCausalLM",),
    model_type="dots1",
    gguf="dots1",
    when={},
    gguf_block=GLM4_MOE_NORMED.gguf_block | {"post_attention_layernorm": "ffn_norm"},
    further=False,
    predictor={},
    reads=("max_window_layers",),
    derived=_windows,
    same={"num_key_value_heads": "num_attention_heads"},
    partial=False,
)
