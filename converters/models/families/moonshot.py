"""Architectures: Moonshot's Kimi Linear. Kimi K2 is of DeepSeek V3's architecture."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lqexport.converters.models.architecture import GATED, Config, Key, Order
from lqexport.converters.models.families.deepseek import (
    BESIDE_EXPERTS,
    K_B,
    LATENT,
    ROUTED_KEYS,
    SHARED,
    SIGMOID,
    V_B,
    keys_and_values,
)
from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import EXPERT_LINEARS, EXPERTS, EXPERTS_BY_NUMBER, RMS_NORM, dense_first
from lqexport.converters.models.families.state_spaces import KEY_HEADS_OF_BLOCKS, RECURRENT, key_heads
from lqexport.converters.models.hf_defaults import FULL

ONLY_RECURRENT = ("k_proj", "v_proj", "conv1d", "forget_gate", "b_proj", "g_", "o_norm")
"""Starts of the names of modules that only blocks with delta attention have."""
NESTED = {"linear_head_dim": "head_dim", "linear_num_heads": "num_heads"}
NESTED |= {"linear_conv_kernel_dim": "short_conv_kernel_size"}
"""Key of config.json -> its name within `linear_attn_config` of published models."""


def _types(config: Config) -> list[str]:
    """Returns the types of the blocks. Published models list their numbers from 1 on."""
    layers, nested = config.get("num_hidden_layers") or 0, config.get("linear_attn_config") or {}
    if config.get("layer_types") or "full_attn_layers" not in nested:
        return config.get("layer_types") or [FULL if i and i % 4 == 0 else RECURRENT for i in range(layers)]
    return [FULL if layer + 1 in nested["full_attn_layers"] else RECURRENT for layer in range(layers)]


def _kimi(config: Config) -> Config:
    """Returns the types of the blocks, and values of nested keys under the names that transformers has for them.

    Each query head has its own key head. Where experts of all groups may be chosen, groups change nothing.
    """
    layers, types, nested = config.get("num_hidden_layers") or 0, _types(config), config.get("linear_attn_config") or {}
    mlps = config.get("mlp_layer_types")
    dense = config.get("first_k_dense_replace", 1) if mlps is None else mlps.count("dense")
    groups, chosen = config.get("n_group") or 1, config.get("topk_group") or 1
    return (
        {key: nested[name] for key, name in NESTED.items() if name in nested}
        | key_heads({"num_key_value_heads": 1}, types)
        | ({"n_group": 1, "topk_group": 1} if chosen >= groups else {})
        | {
            "num_key_value_heads": config.get("num_attention_heads"),
            "layer_types": types,
            "linear_attn_config": {},  # its values have names of their own now
            "first_k_dense_replace": dense,
            "mlp_layer_types": mlps or dense_first(dense, layers),
            "usual_mlp_layer_types": dense_first(dense, layers),
        }
    )


def _from_gguf(config: Config) -> Config:
    return {"mlp_layer_types": dense_first(config["first_k_dense_replace"], config["num_hidden_layers"])}


def _convolutions(config: Config) -> dict[str, Order]:
    """Returns the convolutions of queries, keys and values, with the numbers of their channels in that of all three."""
    channels = config["linear_head_dim"] * config["linear_num_heads"]
    return {name: np.arange(channels) + number * channels for number, name in enumerate(("q", "k", "v"))}


KIMI_LINEAR = replace(
    LLAMA,
    family="Kimi Linear",
    classes=("KimiLinearForCausalLM",),
    model_type="kimi_linear",
    gguf="kimi-linear",
    exl2=None,
    linears=(
        (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.kv_a_proj_with_mqa",
            "self_attn.forget_gate.f_a_proj",
            "self_attn.b_proj",
            "self_attn.g_a_proj",
        ),
        ("self_attn.forget_gate.f_b_proj",),
        ("self_attn.g_b_proj",),
        (V_B,),
        ("self_attn.o_proj",),
        *BESIDE_EXPERTS,
        *EXPERT_LINEARS,
    ),
    gguf_block={
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        **{f"self_attn.conv1d.{name}": f"ssm_conv1d_{name}" for name in ("q", "k", "v")},
        "self_attn.forget_gate.f_a_proj": "ssm_f_a",
        "self_attn.forget_gate.f_b_proj": "ssm_f_b",
        "self_attn.b_proj": "ssm_beta",
        "self_attn.g_a_proj": "ssm_g_a",
        "self_attn.g_b_proj": "ssm_g_b",
        "self_attn.o_norm": "ssm_norm",
        **{name: gguf for name, gguf in LATENT.items() if name != "self_attn.kv_b_proj"},
        K_B: "attn_k_b",
        V_B: "attn_v_b",
        "post_attention_layernorm": "ffn_norm",
        **GATED,
        **SHARED,
        **EXPERTS,
    },
    gguf_tensors={
        "self_attn.forget_gate.A_log": "ssm_a",
        "self_attn.forget_gate.dt_bias": "ssm_dt.bias",
        "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    },
    only={
        **dict.fromkeys((f"self_attn.{name}" for name in ONLY_RECURRENT), ("layer_types", (RECURRENT,))),
        "self_attn.kv_": ("layer_types", (FULL,)),
    },
    parts={"self_attn.conv1d": _convolutions, "self_attn.kv_b_proj": keys_and_values},
    turned={K_B: "num_attention_heads"},
    rounded=(K_B,),
    grouped={f"{K_B}.weight": "num_attention_heads", f"{V_B}.weight": "num_attention_heads"},
    decays=("self_attn.forget_gate.A_log",),
    columns=("self_attn.forget_gate.A_log",),
    shaped={"self_attn.forget_gate.A_log": (1, 1, -1, 1)},
    experts="num_local_experts",
    dense="first_k_dense_replace",
    rows={},
    renamed={
        r"self_attn\.([qkv])_conv1d\.": r"self_attn.conv1d.\1.",
        r"self_attn\.(f_[ab]_proj\.|dt_bias$|A_log$)": r"self_attn.forget_gate.\1",
        r"\.block_sparse_moe\.": ".mlp.",
        **EXPERTS_BY_NUMBER,
    },
    keys=(
        RMS_NORM,
        KEY_HEADS_OF_BLOCKS,
        Key("rope.dimension_count", "qk_rope_head_dim"),
        Key("attention.kv_lora_rank", "kv_lora_rank"),
        Key("ssm.conv_kernel", "linear_conv_kernel_dim"),
        Key("kda.head_dim", "linear_head_dim"),
        Key("leading_dense_block_count", "first_k_dense_replace"),
        *(replace(key, config="num_local_experts") if key.name == "expert_count" else key for key in ROUTED_KEYS),
        Key("expert_gating_func", "expert_gating_func", int, SIGMOID),
    ),
    aliases={
        "model_max_length": "max_position_embeddings",
        "moe_renormalize": "norm_topk_prob",
        "num_expert_group": "n_group",
        "num_experts": "num_local_experts",
        "num_experts_per_token": "num_experts_per_tok",
        "num_shared_experts": "n_shared_experts",
    },
    reads=("layer_types", "mlp_layer_types", "n_group", "topk_group"),
    derived=_kimi,
    restored=_from_gguf,
    fixed={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "q_lora_rank": (None,),
        "n_group": (1,),
        "topk_group": (1,),
        "norm_topk_prob": (True,),
        "tie_word_embeddings": (False,),
    },
    same={"linear_num_heads": "num_attention_heads", "mlp_layer_types": "usual_mlp_layer_types"},
    flags={},
    needs_types=(FULL, RECURRENT),
    rope_types=(),
    latent=True,
    absorbed=True,
)
