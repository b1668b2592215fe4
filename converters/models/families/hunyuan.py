"""Architectures: Hunyuan."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import GATED
from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import ATTENTION, RMS_NORM, rope_of_alpha

HUNYUAN = replace(
    LLAMA,
    family="Hunyuan (0.5B to 7B)",
    classes=("HunYuanDenseV1ForCausalLM",),
    model_type="hunyuan_v1_dense",
    gguf="hunyuan-dense",
    exl2=None,
    gguf_block={
        "input_layernorm": "attn_norm",
        **ATTENTION,
        "self_attn.query_layernorm": "attn_q_norm",
        "self_attn.key_layernorm": "attn_k_norm",
        "post_attention_layernorm": "ffn_norm",
        **GATED,
    },
    rows={},
    keys=(replace(RMS_NORM, default=1e-5),),
    derived=rope_of_alpha,
    fixed={"hidden_act": ("silu",)},
    flags={"attention_bias": "self_attn.q_proj"},
    rope_types=("default", "dynamic", "linear", "yarn"),
)
