"""Architectures: OLMo."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import GATED
from lqexport.converters.models.families.parts import ATTENTION, HEAD_NORMS, RMS_NORM
from lqexport.converters.models.families.qwen import QWEN2

OLMO2 = replace(
    QWEN2,
    family="OLMo 2",
    classes=("Olmo2ForCausalLM",),
    model_type="olmo2",
    gguf="olmo2",
    exl2=None,
    gguf_block={
        **ATTENTION,
        **HEAD_NORMS,
        "post_attention_layernorm": "post_attention_norm",
        **GATED,
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    adds=False,
    keys=(replace(RMS_NORM, default=1e-5),),
    fixed={"hidden_act": ("silu",), "attention_bias": (False,)},
    rope_types=("default", "dynamic"),
    defaults={},
)
