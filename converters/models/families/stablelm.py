"""Architectures: StableLM."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import LAYER_NORM

STABLELM = replace(
    LLAMA,
    family="StableLM 3B, StableLM 2 1.6B, StableLM Zephyr",
    classes=("StableLmForCausalLM",),
    model_type="stablelm",
    gguf="stablelm",
    exl2=None,
    gguf_top=LLAMA.gguf_top | {"model.norm.bias": "output_norm.bias"},
    rows={},
    keys=(LAYER_NORM,),
    partial=True,
    fixed={
        "hidden_act": ("silu",),
        "qk_layernorm": (False,),
        "use_parallel_residual": (False,),
        "tie_word_embeddings": (False,),
    },
    flags={"use_qkv_bias": "self_attn.q_proj"},
    rope_types=("default", "dynamic"),
    free_heads=False,
)
