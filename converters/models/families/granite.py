"""Architectures: Granite."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import Key, Stack
from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import ATTENTION, EXPERT_KEYS, QKV, RMS_NORM

GRANITE = replace(
    LLAMA,
    family="Granite 3",
    classes=("GraniteForCausalLM",),
    model_type="granite",
    gguf="granite",
    # ExLlamaV2 multiplies scales by residual_multiplier and rounds them again, to numbers that the solver did not see.
    exl2=None,
    adds=False,  # the outputs are multiplied by residual_multiplier first
    keys=(
        RMS_NORM,
        Key("attention.scale", "attention_multiplier", float, 1.0),
        Key("embedding_scale", "embedding_multiplier", float, 1.0),
        Key("residual_scale", "residual_multiplier", float, 1.0),
        Key("logit_scale", "logits_scaling", float, 1.0),
    ),
    rope_types=("default", "dynamic"),
)


GRANITE_MOE = replace(
    GRANITE,
    family="Granite 3 MoE",
    classes=("GraniteMoeForCausalLM",),
    model_type="granitemoe",
    gguf="granitemoe",
    linears=(
        QKV,
        ("self_attn.o_proj",),
        ("block_sparse_moe.experts.*.gate_proj", "block_sparse_moe.experts.*.up_proj"),
        ("block_sparse_moe.experts.*.down_proj",),
    ),
    gguf_block={
        "input_layernorm": "attn_norm",
        **ATTENTION,
        "post_attention_layernorm": "ffn_norm",
        "block_sparse_moe.router": "ffn_gate_inp",
        "block_sparse_moe.experts.*.gate_proj": "ffn_gate_exps",
        "block_sparse_moe.experts.*.up_proj": "ffn_up_exps",
        "block_sparse_moe.experts.*.down_proj": "ffn_down_exps",
    },
    experts="num_local_experts",
    stacked={
        "block_sparse_moe.input_linear.weight": Stack(
            ("block_sparse_moe.experts.*.gate_proj.weight", "block_sparse_moe.experts.*.up_proj.weight")
        ),
        "block_sparse_moe.output_linear.weight": Stack(("block_sparse_moe.experts.*.down_proj.weight",)),
    },
    renamed={r"\.router\.layer\.": ".router."},
    keys=(*GRANITE.keys, *EXPERT_KEYS),
    flags={"attention_bias": "self_attn.q_proj"},
)
