"""Architectures: Mixtral."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import ExLlamaV2
from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import (
    ATTENTION,
    EXPERT_KEYS,
    EXPERT_LINEARS,
    EXPERTS,
    EXPERTS_BY_NUMBER,
    QKV,
    RMS_NORM,
)

PUBLISHED_NAMES = {
    r"\.mlp\.": ".block_sparse_moe.",
    r"\.gate_proj\.": ".w1.",
    r"\.up_proj\.": ".w3.",
    r"\.down_proj\.": ".w2.",
}
"""Regular expression -> replacement; together they turn the names of modules into those of published checkpoints."""

MIXTRAL = replace(
    LLAMA,
    family="Mixtral",
    classes=("MixtralForCausalLM",),
    model_type="mixtral",
    exl2=ExLlamaV2(renamed=PUBLISHED_NAMES),
    linears=(QKV, ("self_attn.o_proj",), *EXPERT_LINEARS),
    gguf_block={"input_layernorm": "attn_norm", **ATTENTION, "post_attention_layernorm": "ffn_norm", **EXPERTS},
    experts="num_local_experts",
    renamed={r"\.block_sparse_moe\.": ".mlp.", **EXPERTS_BY_NUMBER},
    keys=(replace(RMS_NORM, default=1e-5), *EXPERT_KEYS),
    flags={},
)
