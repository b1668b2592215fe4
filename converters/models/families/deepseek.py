"""Architectures: DeepSeek."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lqexport.converters.models.architecture import CUT, GATED, PREDICTOR, Architecture, Config, Key, Order
from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import EXPERT_LINEARS, EXPERTS, RMS_NORM, mlp_types
from lqexport.converters.models.tensor_names import head_count

LATENT = {
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "self_attn.o_proj": "attn_output",
}

LATENT_QUERY = {
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
}

SHARED = {
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}

BESIDE_EXPERTS = (
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
    ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    ("mlp.shared_experts.down_proj",),
)

ROUTED_KEYS = (
    Key("expert_count", "n_routed_experts"),
    Key("expert_used_count", "num_experts_per_tok"),
    Key("expert_shared_count", "n_shared_experts"),
    Key("expert_feed_forward_length", "moe_intermediate_size"),
    Key("expert_weights_scale", "routed_scaling_factor", float, 1.0),
)

DEEPSEEK_KEYS = (
    RMS_NORM,
    Key("leading_dense_block_count", "first_k_dense_replace"),
    Key("attention.q_lora_rank", "q_lora_rank"),
    Key("attention.kv_lora_rank", "kv_lora_rank"),
    *ROUTED_KEYS,
)

SOFTMAX, SIGMOID = 1, 2
"""The function that turns the score of an expert into its weight.

The numbers are llama.cpp's. A config.json that is rebuilt from GGUF has them as `expert_gating_func`."""


def _latent(config: Config) -> Config:
    """Returns the number of key heads, and the groups of experts where they have no effect.

    Each query head has its own key head, whatever number config.json gives. Where experts of all groups may be chosen,
    groups change nothing, and llama.cpp wants none.
    """
    groups, chosen = config.get("n_group") or 1, config.get("topk_group") or 1
    none = {"n_group": 1, "topk_group": 1} if chosen >= groups else {}
    return {"num_key_value_heads": config.get("num_attention_heads")} | none


DEEPSEEK_V3 = replace(
    LLAMA,
    family="DeepSeek V3, R1",
    classes=("DeepseekV3ForCausalLM",),
    model_type="deepseek_v3",
    gguf="deepseek2",
    exl2=None,
    linears=(
        ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
        ("self_attn.q_b_proj",),
        ("self_attn.kv_b_proj",),
        ("self_attn.o_proj",),
        *BESIDE_EXPERTS,
        *EXPERT_LINEARS,
    ),
    gguf_block={
        "input_layernorm": "attn_norm",
        **LATENT_QUERY,
        **LATENT,
        "post_attention_layernorm": "ffn_norm",
        **GATED,
        **SHARED,
        **EXPERTS,
    },
    gguf_tensors={"mlp.gate.e_score_correction_bias": "exp_probs_b.bias"},
    experts="n_routed_experts",
    dense="first_k_dense_replace",
    rows={},
    further=True,
    keys=(
        *DEEPSEEK_KEYS,
        Key("expert_group_count", "n_group", int, 1),
        Key("expert_group_used_count", "topk_group", int, 1),
        Key("expert_weights_norm", "norm_topk_prob", bool, True),
        Key("expert_gating_func", "expert_gating_func", int, SIGMOID),
    ),
    derived=_latent,
    fixed={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "rope_interleave": (True,),
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "moe_layer_freq": (1,),
    },
    flags={},
    latent=True,
    cuttable=True,
    mscale=0.1,
    rope_types=("default", "dynamic", "yarn"),
)


def _with_plain_queries(entry: Architecture, family: str) -> Architecture:
    """Returns the entry for a family's smaller models, in which only keys and values are latent."""
    modules = {name: gguf for name, gguf in entry.gguf_block.items() if name not in LATENT_QUERY}
    (_, _, *others), keys = entry.linears, tuple(key for key in entry.keys if key.config != "q_lora_rank")
    return replace(
        entry,
        family=family,
        when={"q_lora_rank": (None,)},
        linears=(("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa"), *others),
        gguf_block={"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q"} | modules,
        keys=keys,
        fixed=entry.fixed | {"num_hidden_layers": (27, 26)},
    )


DEEPSEEK_V2 = replace(
    DEEPSEEK_V3,
    family="DeepSeek V2",
    classes=("DeepseekV2ForCausalLM",),
    model_type="deepseek_v2",
    gguf_tensors={},
    keys=(
        *DEEPSEEK_KEYS,
        Key("expert_weights_norm", "norm_topk_prob", bool, False),
        Key("expert_gating_func", "expert_gating_func", int, SOFTMAX),
    ),
    fixed=DEEPSEEK_V3.fixed
    | {"mlp_bias": (False,), "norm_topk_prob": (False,), "scoring_func": ("softmax",), "topk_method": ("greedy",)},
)


def with_mlp_types(config: Config) -> Config:
    """Returns what `derived` of DeepSeek V3 returns, and what `mlp_types` does."""
    return _latent(config) | mlp_types(config)


def keys_and_values(config: Config) -> dict[str, Order]:
    """Returns the rows of `kv_b_proj` that compute keys, and those that compute values. Each head has both in turn."""
    heads, keys = head_count(config), head_count(config, "qk_nope_head_dim")
    rows = np.arange(heads * (keys + head_count(config, "v_head_dim"))).reshape(heads, -1)
    return {"k_b": rows[:, :keys].reshape(-1), "v_b": rows[:, keys:].reshape(-1)}


K_B, V_B = "self_attn.kv_b_proj.k_b", "self_attn.kv_b_proj.v_b"
"""The linears that take the place of `kv_b_proj` where llama.cpp attends to latent vectors.

The first turns queries into the space of these vectors, so it is the transpose of what turns the vectors into keys."""


def in_two(entry: Architecture) -> Architecture:
    """Returns the entry for the same models with `kv_b_proj` cut in two, so that llama.cpp attends to latent vectors.

    It drafts with their blocks that predict further tokens only then, and if queries are latent, too.
    """
    return replace(
        entry,
        when=entry.when | {CUT: (True,)},
        linears=tuple((V_B,) if group == ("self_attn.kv_b_proj",) else group for group in entry.linears),
        gguf_block={name: gguf for name, gguf in entry.gguf_block.items() if name != "self_attn.kv_b_proj"}
        | {K_B: "attn_k_b", V_B: "attn_v_b"},
        parts={"self_attn.kv_b_proj": keys_and_values},
        turned={K_B: "num_attention_heads"},
        rounded=(K_B,),
        grouped={f"{K_B}.weight": "num_attention_heads", f"{V_B}.weight": "num_attention_heads"},
        predictor=PREDICTOR if LATENT_QUERY.keys() <= entry.gguf_block.keys() else {},
        absorbed=True,
        cuttable=False,
    )


INDEXER = "self_attn.indexer"
"""The module that chooses the tokens to which a token attends."""

DEEPSEEK_V32 = replace(
    in_two(DEEPSEEK_V3),
    family="DeepSeek V3.2",
    classes=("DeepseekV32ForCausalLM",),
    model_type="deepseek_v32",
    gguf="deepseek32",
    when={},
    linears=(
        ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", f"{INDEXER}.wk", f"{INDEXER}.weights_proj"),
        ("self_attn.q_b_proj", f"{INDEXER}.wq_b"),
        *in_two(DEEPSEEK_V3).linears[2:],
    ),
    gguf_block=in_two(DEEPSEEK_V3).gguf_block
    | {
        f"{INDEXER}.wq_b": "indexer.attn_q_b",
        f"{INDEXER}.wk": "indexer.attn_k",
        f"{INDEXER}.k_norm": "indexer.k_norm",
        f"{INDEXER}.weights_proj": "indexer.proj",
    },
    gguf_tensors=DEEPSEEK_V3.gguf_tensors | {f"{INDEXER}.k_norm.bias": "indexer.k_norm.bias"},
    keys=(
        *DEEPSEEK_V3.keys,
        Key("attention.indexer.head_count", "index_n_heads"),
        Key("attention.indexer.key_length", "index_head_dim"),
        Key("attention.indexer.top_k", "index_topk"),
    ),
    derived=with_mlp_types,
    fixed={key: values for key, values in DEEPSEEK_V3.fixed.items() if key != "rope_interleave"},
    only_mscale=1.0,
)

DEEPSEEK_V3_LITE = _with_plain_queries(DEEPSEEK_V3, "DeepSeek V3 with plain queries")

DEEPSEEK_V2_LITE = _with_plain_queries(DEEPSEEK_V2, "DeepSeek V2 Lite, Coder V2 Lite")
