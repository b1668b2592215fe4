"""Architectures: Arcee."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import ATTENTION, QKV, RMS_NORM

ARCEE = replace(
    LLAMA,
    family="Arcee AFM",
    classes=("ArceeForCausalLM",),
    model_type="arcee",
    gguf="arcee",
    exl2=None,
    linears=(QKV, ("self_attn.o_proj",), ("mlp.up_proj",), ("mlp.down_proj",)),
    gguf_block={
        "input_layernorm": "attn_norm",
        **ATTENTION,
        "post_attention_layernorm": "ffn_norm",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    keys=(replace(RMS_NORM, default=1e-5),),
    fixed={"hidden_act": ("relu2",), "attention_bias": (False,), "mlp_bias": (False,)},
    flags={},
)
