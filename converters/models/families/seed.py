"""Architectures: Seed."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import GATED
from lqexport.converters.models.families.parts import ATTENTION
from lqexport.converters.models.families.qwen import QWEN2

SEED_OSS = replace(
    QWEN2,
    family="Seed-OSS",
    classes=("SeedOssForCausalLM",),
    model_type="seed_oss",
    gguf="seed_oss",
    exl2=None,
    gguf_block={
        "input_layernorm": "attn_norm",
        **ATTENTION,
        "post_attention_layernorm": "post_attention_norm",
        **GATED,
    },
    fixed={"hidden_act": ("silu",), "attention_out_bias": (False,), "mlp_bias": (False,)},
    flags={"attention_bias": "self_attn.q_proj"},
    rope_types=("default", "dynamic", "linear", "yarn"),
)
