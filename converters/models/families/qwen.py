"""Architectures: Qwen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lqexport.converters.models.architecture import FURTHER_COUNT, GATED, PREDICTOR, Config, ExLlamaV2, Key
from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import (
    ALL_EXPERTS_BLOCK,
    ALL_EXPERTS_LINEARS,
    ATTENTION,
    EXPERT_KEYS,
    EXPERT_LINEARS,
    EXPERTS,
    HEAD_NORMS,
    QKV,
    RMS_NORM,
    expert_stacks,
)
from lqexport.converters.models.hf_defaults import FULL
from lqexport.converters.models.value_heads import KEY_HEADS, VALUE_HEADS, fused_parts

QWEN2 = replace(
    LLAMA,
    family="Qwen2, Qwen2.5",
    classes=("Qwen2ForCausalLM",),
    model_type="qwen2",
    gguf="qwen2",
    exl2=ExLlamaV2(biased=QKV),
    when={"text_part_of": (None,)},
    rows={},
    flags={},
    rope_types=("default", "dynamic", "yarn"),
)

QWEN2_VL = replace(
    QWEN2,
    family="Qwen2-VL, Qwen2.5-VL (the text part)",
    classes=("Qwen2ForCausalLM", "Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"),
    gguf="qwen2vl",
    when={"text_part_of": ("qwen2_vl", None)},
    derived=lambda config: {"text_part_of": "qwen2_vl"},
    rope_types=("default",),
    rope_sections=(16, 24, 24),
    square_heads=True,
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
    fixed={"hidden_act": ("silu",), "attention_bias": (False,)},
)

QWEN3_VL = replace(
    QWEN3,
    family="Qwen3-VL (the text part)",
    classes=("Qwen3ForCausalLM", "Qwen3VLForConditionalGeneration"),
    gguf="qwen3vl",
    when={"text_part_of": ("qwen3_vl", None)},
    keys=(*QWEN3.keys, Key("n_deepstack_layers", "deepstack_layers", default=3)),
    derived=lambda config: {"text_part_of": "qwen3_vl"},
    rope_types=("default",),
    rope_sections=(24, 20, 20),
)

SPARSE = "blocks_with_experts"
"""The key of `only` that says which blocks have experts. config.json says it by the keys of `ALL_SPARSE`."""
DENSE_OR_EXPERTS = {"mlp.": (SPARSE, (True,)), **dict.fromkeys(GATED, (SPARSE, (False,)))}
ALL_SPARSE: dict[str, tuple[Any, ...]] = {"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}
"""llama.cpp loads such models only with experts in all blocks."""
DENSE_LINEARS = (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))


def _sparse_blocks(config: Config) -> Config:
    """Returns which blocks have experts; the others have a gated MLP."""
    layers, step = config.get("num_hidden_layers") or 0, config.get("decoder_sparse_step") or 1
    dense = config.get("mlp_only_layers") or []
    return {SPARSE: [layer not in dense and (layer + 1) % step == 0 for layer in range(layers)]}


QWEN3_MOE = replace(
    QWEN3,
    family="Qwen3 MoE",
    classes=("Qwen3MoeForCausalLM",),
    model_type="qwen3_moe",
    gguf="qwen3moe",
    linears=(*ALL_EXPERTS_LINEARS, *DENSE_LINEARS),
    gguf_block=ALL_EXPERTS_BLOCK | GATED,
    experts="num_local_experts",
    only=DENSE_OR_EXPERTS,
    keys=(RMS_NORM, *EXPERT_KEYS, Key("expert_feed_forward_length", "moe_intermediate_size")),
    aliases={"num_experts": "num_local_experts"},
    derived=_sparse_blocks,
    fixed=QWEN3.fixed | {"norm_topk_prob": (True,)} | ALL_SPARSE,
)

STACKED = expert_stacks("mlp.experts")

QWEN3_VL_MOE = replace(
    QWEN3_MOE,
    family="Qwen3-VL MoE (the text part)",
    classes=("Qwen3MoeForCausalLM", "Qwen3VLMoeForConditionalGeneration"),
    gguf="qwen3vlmoe",
    when={"text_part_of": ("qwen3_vl_moe", None)},
    stacked={
        "mlp.experts.gate_up_proj": replace(STACKED["mlp.experts.gate_up_proj"], columns="hidden_size"),
        "mlp.experts.down_proj": replace(STACKED["mlp.experts.down_proj"], columns="moe_intermediate_size"),
    },
    keys=(*QWEN3_MOE.keys, *QWEN3_VL.keys[len(QWEN3.keys) :]),
    # The router of its own config class always divides by the sum.
    derived=lambda config: _sparse_blocks(config) | {"text_part_of": "qwen3_vl_moe", "norm_topk_prob": True},
    rope_types=QWEN3_VL.rope_types,
    rope_sections=QWEN3_VL.rope_sections,
)

SHARED_BLOCK = {
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
SHARED_LINEARS = (
    ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    ("mlp.shared_expert.down_proj",),
)

QWEN2_MOE = replace(
    QWEN2,
    family="Qwen1.5 MoE, Qwen2 MoE",
    classes=("Qwen2MoeForCausalLM",),
    model_type="qwen2_moe",
    gguf="qwen2moe",
    exl2=None,
    linears=(
        QKV,
        ("self_attn.o_proj",),
        *SHARED_LINEARS,
        *EXPERT_LINEARS,
        *DENSE_LINEARS,
    ),
    gguf_block={
        "input_layernorm": "attn_norm",
        **ATTENTION,
        "post_attention_layernorm": "ffn_norm",
        **SHARED_BLOCK,
        **EXPERTS,
        **GATED,
    },
    one_row=("mlp.shared_expert_gate",),
    experts="num_local_experts",
    only=DENSE_OR_EXPERTS,
    keys=(*QWEN3_MOE.keys, Key("expert_shared_feed_forward_length", "shared_expert_intermediate_size")),
    aliases=QWEN3_MOE.aliases,
    derived=_sparse_blocks,
    fixed=QWEN2.fixed | ALL_SPARSE | {"norm_topk_prob": (False,), "tie_word_embeddings": (False,)},
    flags={"qkv_bias": "self_attn.q_proj"},
    square_heads=True,
)

LINEAR = "linear_attention"


def _delta_net(config: Config) -> Config:
    """Returns the types of the blocks, and values that llama.cpp has keys for.

    `full_attention_interval` n says that every n-th block has attention. It is None where the types are other ones.
    """
    layers, types = config.get("num_hidden_layers") or 0, config.get("layer_types")
    if not isinstance(types, list):
        types = _with_attention(config.get("full_attention_interval") or 4, layers)
    interval = types.index(FULL) + 1 if FULL in types else layers + 1
    size, heads = config.get("linear_value_head_dim") or 0, config.get(VALUE_HEADS) or 0
    return {
        "layer_types": types,
        "full_attention_interval": interval if types == _with_attention(interval, layers) else None,
        "linear_inner_size": size * heads,
    }


def _with_attention(interval: int, layers: int) -> list[str]:
    """Returns the types of blocks of which every `interval`-th has attention."""
    return [LINEAR if (layer + 1) % interval else FULL for layer in range(layers)]


QWEN3_5 = replace(
    QWEN3,
    family="Qwen3.5 (of models with images: the text part)",
    classes=("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
    model_type="qwen3_5_text",
    gguf="qwen35",
    linears=(
        QKV,
        ("self_attn.o_proj",),
        (
            "linear_attn.in_proj_qkv",
            "linear_attn.in_proj_z",
            "linear_attn.in_proj_b",
            "linear_attn.in_proj_a",
        ),
        ("linear_attn.out_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    gguf_block={
        "input_layernorm": "attn_norm",
        **ATTENTION,
        **HEAD_NORMS,
        "linear_attn.in_proj_qkv": "attn_qkv",
        "linear_attn.in_proj_z": "attn_gate",
        "linear_attn.in_proj_b": "ssm_beta",
        "linear_attn.in_proj_a": "ssm_alpha",
        "linear_attn.conv1d": "ssm_conv1d",
        "linear_attn.norm": "ssm_norm",
        "linear_attn.out_proj": "ssm_out",
        "post_attention_layernorm": "post_attention_norm",
        **GATED,
    },
    gguf_tensors={"linear_attn.A_log": "ssm_a", "linear_attn.dt_bias": "ssm_dt.bias"},
    only={"self_attn.": ("layer_types", (FULL,)), "linear_attn.": ("layer_types", (LINEAR,))},
    rows={
        "linear_attn.in_proj_qkv": ("values_last", KEY_HEADS),
        "linear_attn.in_proj_z": ("values", KEY_HEADS),
        "linear_attn.in_proj_b": ("values", KEY_HEADS),
        "linear_attn.in_proj_a": ("values", KEY_HEADS),
        "linear_attn.conv1d": ("values_last", KEY_HEADS),
        "linear_attn.A_log": ("values", KEY_HEADS),
        "linear_attn.dt_bias": ("values", KEY_HEADS),
    },
    tiled=("linear_attn.out_proj",),
    norm_plus=1,
    further=True,
    predictor=PREDICTOR,
    predicts_like=(FULL, True),
    plain_norms=("linear_attn.norm",),
    decays=("linear_attn.A_log",),
    keys=(
        RMS_NORM,
        Key("full_attention_interval", "full_attention_interval"),
        Key("ssm.conv_kernel", "linear_conv_kernel_dim"),
        Key("ssm.state_size", "linear_key_head_dim"),
        Key("ssm.group_count", KEY_HEADS),
        Key("ssm.time_step_rank", VALUE_HEADS),
        Key("ssm.inner_size", "linear_inner_size"),
    ),
    aliases={"mtp_num_hidden_layers": FURTHER_COUNT},
    derived=_delta_net,
    same={"linear_value_head_dim": "linear_key_head_dim"},
    partial=True,
    rope_sections=(11, 11, 10),
    gated=True,
)

QWEN3_5_MOE = replace(
    QWEN3_5,
    family="Qwen3.5 MoE (of models with images: the text part)",
    classes=("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
    model_type="qwen3_5_moe_text",
    gguf="qwen35moe",
    linears=(*QWEN3_5.linears[:4], *SHARED_LINEARS, *EXPERT_LINEARS),
    gguf_block={module: gguf for module, gguf in QWEN3_5.gguf_block.items() if module not in GATED}
    | SHARED_BLOCK
    | EXPERTS,
    stacked=STACKED,
    one_row=QWEN2_MOE.one_row,
    experts="num_local_experts",
    keys=(*QWEN3_5.keys, *QWEN2_MOE.keys[1:]),
    aliases=QWEN3_MOE.aliases | QWEN3_5.aliases,
    derived=lambda config: (
        _delta_net(config)
        | {"intermediate_size": config.get("intermediate_size") or config.get("moe_intermediate_size")}
    ),
)

QWEN3_NEXT = replace(
    QWEN3_5_MOE,
    family="Qwen3-Next",
    classes=("Qwen3NextForCausalLM",),
    model_type="qwen3_next",
    gguf="qwen3next",
    linears=(
        *QWEN3_5.linears[:2],
        ("linear_attn.in_proj_qkvz.qkv", "linear_attn.in_proj_qkvz.z", "linear_attn.in_proj_ba"),
        *QWEN3_5_MOE.linears[3:],
        *DENSE_LINEARS,
    ),
    gguf_block={
        "input_layernorm": "attn_norm",
        **ATTENTION,
        **HEAD_NORMS,
        "linear_attn.in_proj_qkvz.qkv": "attn_qkv",
        "linear_attn.in_proj_qkvz.z": "attn_gate",
        "linear_attn.in_proj_ba": "ssm_ba",
        "linear_attn.conv1d": "ssm_conv1d",
        "linear_attn.norm": "ssm_norm",
        "linear_attn.out_proj": "ssm_out",
        "post_attention_layernorm": "post_attention_norm",
        **SHARED_BLOCK,
        **EXPERTS,
        **GATED,
    },
    only=QWEN3_5.only | DENSE_OR_EXPERTS,
    rows={},
    tiled=(),
    parts={"linear_attn.in_proj_qkvz": fused_parts},
    derived=lambda config: _delta_net(config) | _sparse_blocks(config),
    fixed=QWEN3_MOE.fixed,
    rope_types=("default", "dynamic", "yarn"),
    rope_sections=(),
)
