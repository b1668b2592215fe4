"""Architectures: Hunyuan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lqexport.converters.models.architecture import GATED, Config, Key
from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import (
    ATTENTION,
    EXPERT_KEYS,
    EXPERT_LINEARS,
    EXPERTS,
    QKV,
    RMS_NORM,
    rope_of_alpha,
)

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
    fixed={"hidden_act": ("silu",), "attention_bias": (False,)},
    flags={},
    rope_types=("default", "dynamic", "linear", "yarn"),
)


def _of_all_blocks(value: Any) -> Any:
    """Returns the number that a list has for all blocks, None if it has several; any other value as it is."""
    if not isinstance(value, list):
        return value
    return value[0] if value and all(number == value[0] for number in value) else None


def _hunyuan(config: Config) -> Config:
    """Returns the number of chosen experts, and the rotary settings where `alpha` changes the base."""
    chosen = _of_all_blocks(config.get("num_experts_per_tok"))
    return {"num_experts_per_tok": chosen, "moe_topk": chosen} | rope_of_alpha(config)


HUNYUAN_MOE = replace(
    LLAMA,
    family="Hunyuan A13B",
    classes=("HunYuanMoEV1ForCausalLM",),
    model_type="hunyuan_v1_moe",
    gguf="hunyuan-moe",
    exl2=None,
    linears=(
        QKV,
        ("self_attn.o_proj",),
        ("mlp.shared_mlp.gate_proj", "mlp.shared_mlp.up_proj"),
        ("mlp.shared_mlp.down_proj",),
        *EXPERT_LINEARS,
    ),
    gguf_block={
        "input_layernorm": "attn_norm",
        **ATTENTION,
        "self_attn.query_layernorm": "attn_q_norm",
        "self_attn.key_layernorm": "attn_k_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.shared_mlp.gate_proj": "ffn_gate_shexp",
        "mlp.shared_mlp.up_proj": "ffn_up_shexp",
        "mlp.shared_mlp.down_proj": "ffn_down_shexp",
        "mlp.gate.wg": "ffn_gate_inp",
        **{module: name for module, name in EXPERTS.items() if module != "mlp.gate"},
    },
    experts="num_local_experts",
    rows={},
    keys=(
        RMS_NORM,
        *EXPERT_KEYS,
        Key("expert_feed_forward_length", "intermediate_size"),
        Key("expert_shared_feed_forward_length", "intermediate_size"),
    ),
    aliases={"num_experts": "num_local_experts", "moe_topk": "num_experts_per_tok"},
    derived=_hunyuan,
    fixed={"hidden_act": ("silu",), "attention_bias": (False,)},
    flags={},
    rope_types=("default", "dynamic"),
)
