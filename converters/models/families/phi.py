"""Architectures: Phi."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import ExLlamaV2
from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import LAYER_NORM, QKV
from lqexport.converters.models.families.qwen import QWEN2

PHI = replace(
    LLAMA,
    biased=True,
    family="Phi-1, Phi-1.5, Phi-2",
    classes=("PhiForCausalLM",),
    model_type="phi",
    gguf="phi2",
    exl2=None,
    linears=(QKV, ("self_attn.dense",), ("mlp.fc1",), ("mlp.fc2",)),
    gguf_block={
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.dense": "attn_output",
        "mlp.fc1": "ffn_up",
        "mlp.fc2": "ffn_down",
    },
    gguf_top={
        "model.embed_tokens.weight": "token_embd.weight",
        "model.final_layernorm.weight": "output_norm.weight",
        "model.final_layernorm.bias": "output_norm.bias",
        "lm_head.weight": "output.weight",
        "lm_head.bias": "output.bias",
    },
    rows={},
    keys=(LAYER_NORM,),
    partial=True,
    fixed={
        "hidden_act": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
        "qk_layernorm": (False,),
        "tie_word_embeddings": (False,),
    },
    flags={},
    rope_types=("default", "dynamic"),
    free_heads=False,
    final_norm="model.final_layernorm",
)

SPLIT = {"self_attn.qkv_proj": QKV, "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}
"""Fused linear -> the linears whose rows it has, one after the other."""

PHI3 = replace(
    QWEN2,
    family="Phi-3, Phi-3.5, Phi-4",
    classes=("Phi3ForCausalLM",),
    model_type="phi3",
    gguf="phi3",
    exl2=ExLlamaV2(split=SPLIT),
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
    partial=True,
)
