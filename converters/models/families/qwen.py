"""Architectures: Qwen."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import GATED, ExLlamaV2, Key
from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import (
    ATTENTION,
    EXPERT_KEYS,
    EXPERT_LINEARS,
    EXPERTS,
    HEAD_NORMS,
    QKV,
    RMS_NORM,
)

QWEN2 = replace(
    LLAMA,
    family="Qwen2, Qwen2.5",
    classes=("Qwen2ForCausalLM",),
    model_type="qwen2",
    gguf="qwen2",
    exl2=ExLlamaV2(biased=QKV),
    defaults={"use_sliding_window": False},
    rows={},
    flags={},
    rope_types=("default", "dynamic", "yarn"),
)

QWEN3 = replace(
    QWEN2,
    family="Qwen3",
    classes=("Qwen3ForCausalLM",),
    model_type="qwen3",
    gguf="qwen3",
    exl2=None,  # ExLlamaV2's norms of heads subtract the mean
    gguf_block={
        "input_layernorm": "attn_norm",
        **ATTENTION,
        **HEAD_NORMS,
        "post_attention_layernorm": "ffn_norm",
        **GATED,
    },
    defaults=QWEN2.defaults | {"head_dim": 128},
    fixed={"hidden_act": ("silu",), "attention_bias": (False,)},
)

QWEN3_MOE = replace(
    QWEN3,
    family="Qwen3 MoE",
    classes=("Qwen3MoeForCausalLM",),
    model_type="qwen3_moe",
    gguf="qwen3moe",
    linears=(QKV, ("self_attn.o_proj",), *EXPERT_LINEARS),
    gguf_block={
        "input_layernorm": "attn_norm",
        **ATTENTION,
        **HEAD_NORMS,
        "post_attention_layernorm": "ffn_norm",
        **EXPERTS,
    },
    experts="num_local_experts",
    keys=(RMS_NORM, *EXPERT_KEYS, Key("expert_feed_forward_length", "moe_intermediate_size")),
    aliases={"num_experts": "num_local_experts"},
    defaults=QWEN2.defaults | {"norm_topk_prob": False},
    fixed=QWEN3.fixed | {"norm_topk_prob": (True,), "decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
)
