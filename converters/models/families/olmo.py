"""Architectures: OLMo."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import GATED
from lqexport.converters.models.families.parts import (
    ALL_EXPERTS_BLOCK,
    ALL_EXPERTS_LINEARS,
    ATTENTION,
    EXPERT_KEYS,
    HEAD_NORMS,
    RMS_NORM,
    rope_of_both_types,
)
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
    fixed={"hidden_act": ("silu",), "attention_bias": (False,), "tie_word_embeddings": (False,)},
    rope_types=("default", "dynamic"),
    square_heads=True,
)

OLMOE = replace(
    OLMO2,
    family="OLMoE",
    classes=("OlmoeForCausalLM",),
    model_type="olmoe",
    gguf="olmoe",
    linears=ALL_EXPERTS_LINEARS,
    gguf_block=ALL_EXPERTS_BLOCK,
    experts="num_local_experts",
    adds=True,
    keys=(*OLMO2.keys, *EXPERT_KEYS),
    aliases={"num_experts": "num_local_experts"},
    fixed=OLMO2.fixed | {"clip_qkv": (None,), "norm_topk_prob": (False,)},
    same={"num_key_value_heads": "num_attention_heads"},
)

OLMO3 = replace(
    OLMO2,
    family="OLMo 3",
    classes=("Olmo3ForCausalLM",),
    model_type="olmo3",
    derived=rope_of_both_types,
    rope_types=("default", "dynamic", "linear", "yarn"),
    period=4,
    one_theta=True,
)
