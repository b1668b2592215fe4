"""Architectures: Granite."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import Key
from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import RMS_NORM

GRANITE = replace(
    LLAMA,
    family="Granite 3",
    classes=("GraniteForCausalLM",),
    model_type="granite",
    gguf="granite",
    # ExLlamaV2 multiplies scales by residual_multiplier and rounds them again, to numbers that the solver did not see.
    exl2=None,
    adds=False,  # the outputs are multiplied by residual_multiplier first
    keys=(
        RMS_NORM,
        Key("attention.scale", "attention_multiplier", float, 1.0),
        Key("embedding_scale", "embedding_multiplier", float, 1.0),
        Key("residual_scale", "residual_multiplier", float, 1.0),
        Key("logit_scale", "logits_scaling", float, 1.0),
    ),
    rope_types=("default", "dynamic"),
)
