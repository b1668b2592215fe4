"""Architectures: Qwen."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import GATED, ExLlamaV2, Key
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
)

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

QWEN3_MOE = replace(
    QWEN3,
    family="Qwen3 MoE",
    classes=("Qwen3MoeForCausalLM",),
    model_type="qwen3_moe",
    gguf="qwen3moe",
    linears=ALL_EXPERTS_LINEARS,
    gguf_block=ALL_EXPERTS_BLOCK,
    experts="num_local_experts",
    keys=(RMS_NORM, *EXPERT_KEYS, Key("expert_feed_forward_length", "moe_intermediate_size")),
    aliases={"num_experts": "num_local_experts"},
    fixed=QWEN3.fixed | {"norm_topk_prob": (True,), "decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
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
        ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
        ("mlp.shared_expert.down_proj",),
        *EXPERT_LINEARS,
    ),
    gguf_block={
        "input_layernorm": "attn_norm",
        **ATTENTION,
        "post_attention_layernorm": "ffn_norm",
        "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
        "mlp.shared_expert.up_proj": "ffn_up_shexp",
        "mlp.shared_expert.down_proj": "ffn_down_shexp",
        "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
        **EXPERTS,
    },
    one_row=("mlp.shared_expert_gate",),
    experts="num_local_experts",
    keys=(*QWEN3_MOE.keys, Key("expert_shared_feed_forward_length", "shared_expert_intermediate_size")),
    aliases=QWEN3_MOE.aliases,
    fixed=QWEN2.fixed
    | {
        "norm_topk_prob": (False,),
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([], None),
        "tie_word_embeddings": (False,),
    },
    flags={"qkv_bias": "self_attn.q_proj"},
    square_heads=True,
)
