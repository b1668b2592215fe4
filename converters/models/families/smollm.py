"""Architectures: SmolLM3."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.families.llama import LLAMA

SMOLLM3 = replace(
    LLAMA,
    family="SmolLM3",
    classes=("SmolLM3ForCausalLM",),
    model_type="smollm3",
    gguf="smollm3",
    exl2=None,
    fixed={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "no_rope_layer_interval": (4,),
    },
    flags={},
    rope_types=("default", "dynamic", "yarn"),
)
