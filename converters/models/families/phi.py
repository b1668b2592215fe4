"""Architectures: Phi."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import ExLlamaV2
from lqexport.converters.models.families.parts import QKV
from lqexport.converters.models.families.qwen import QWEN2

PHI3 = replace(
    QWEN2,
    family="Phi-3, Phi-3.5, Phi-4",
    classes=("Phi3ForCausalLM",),
    model_type="phi3",
    gguf="phi3",
    exl2=ExLlamaV2(
        split={"self_attn.qkv_proj": QKV, "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")},
    ),
    linears=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    gguf_block={
        "input_layernorm": "attn_norm",
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    rope_types=("default", "longrope"),
    defaults={},
)
