"""Architectures: LFM2."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import KEY_HEADS, Config, Key
from lqexport.converters.models.families.deepseek import SIGMOID
from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import EXPERT_KEYS, EXPERTS_BY_NUMBER, QKV, RMS_NORM
from lqexport.converters.models.hf_defaults import FULL

CONVOLUTION = "conv"


def _types(config: Config) -> list[str] | None:
    """Returns the types of the blocks; older models list the numbers of the blocks with attention.

    None where config.json says neither, and transformers makes no model of it.
    """
    layers, numbers = config.get("num_hidden_layers", 0), config.get("full_attn_idxs")
    if config.get("layer_types") is not None or not isinstance(layers, int):
        return config.get("layer_types")
    return [FULL if numbers is None or layer in numbers else CONVOLUTION for layer in range(layers)]


def _of_blocks(config: Config) -> Config:
    """Returns the types of the blocks, and their numbers of key heads: 0 for a convolution, as llama.cpp wants."""
    types, heads = _types(config), config.get("num_key_value_heads")
    counts = {"key_heads_of_blocks": [heads if block == FULL else 0 for block in types]} if types else {}
    return {"layer_types": types} | counts


def _adjusted(config: Config) -> Config:
    """Returns the width of the MLP that transformers computes from config.json, and what `_of_blocks` returns."""
    width = config.get("intermediate_size")
    if isinstance(width, int) and config.get("block_auto_adjust_ff_dim"):
        width = int(2 * width / 3)
        if (multiplier := config.get("block_ffn_dim_multiplier")) is not None:
            multiple = config.get("block_multiple_of") or 1
            width = -(-int(multiplier * width) // multiple) * multiple
    return _of_blocks(config) | {"intermediate_size": width, "block_auto_adjust_ff_dim": False}


LFM2 = replace(
    LLAMA,
    family="LFM2",
    classes=("Lfm2ForCausalLM",),
    model_type="lfm2",
    gguf="lfm2",
    exl2=None,
    linears=(
        ("conv.in_proj",),
        ("conv.out_proj",),
        QKV,
        ("self_attn.out_proj",),
        ("feed_forward.w1", "feed_forward.w3"),
        ("feed_forward.w2",),
    ),
    gguf_block={
        "operator_norm": "attn_norm",
        "conv.in_proj": "shortconv.in_proj",
        "conv.conv": "shortconv.conv",
        "conv.out_proj": "shortconv.out_proj",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.q_layernorm": "attn_q_norm",
        "self_attn.k_layernorm": "attn_k_norm",
        "self_attn.out_proj": "attn_output",
        "ffn_norm": "ffn_norm",
        "feed_forward.w1": "ffn_gate",
        "feed_forward.w3": "ffn_up",
        "feed_forward.w2": "ffn_down",
    },
    gguf_top={
        "model.embed_tokens.weight": "token_embd.weight",
        "model.embedding_norm.weight": "token_embd_norm.weight",
        "lm_head.weight": "output.weight",
    },
    only={"conv.": ("layer_types", (CONVOLUTION,)), "self_attn.": ("layer_types", (FULL,))},
    rows={},
    keys=(
        replace(RMS_NORM, config="norm_eps"),
        Key("shortconv.l_cache", "conv_L_cache"),
        Key(KEY_HEADS, "key_heads_of_blocks", many=True),
    ),
    former={"block_ff_dim": "intermediate_size", "tie_embedding": "tie_word_embeddings"},
    derived=_adjusted,
    reads=("block_ffn_dim_multiplier", "block_multiple_of"),
    fixed={"conv_bias": (False,), "block_auto_adjust_ff_dim": (False,)},
    flags={},
    rope_types=("default", "dynamic", "linear", "yarn"),
    needs_types=(CONVOLUTION, FULL),
    square_heads=True,
    final_norm="model.embedding_norm",
)


def _with_experts(config: Config) -> Config:
    """Returns what `_of_blocks` returns, and the type of each block's MLP."""
    layers, leading = config.get("num_hidden_layers"), config.get("num_dense_layers")
    if not isinstance(layers, int) or not isinstance(leading, int):
        return _of_blocks(config)
    types = ["dense" if layer < leading else "sparse" for layer in range(layers)]
    return _of_blocks(config) | {"mlp_layer_types": types}


LFM2_MOE = replace(
    LFM2,
    family="LFM2 MoE",
    classes=("Lfm2MoeForCausalLM",),
    model_type="lfm2_moe",
    gguf="lfm2moe",
    linears=(
        *LFM2.linears,
        ("feed_forward.experts.*.gate_proj", "feed_forward.experts.*.up_proj"),
        ("feed_forward.experts.*.down_proj",),
    ),
    gguf_block=LFM2.gguf_block
    | {
        "feed_forward.gate": "ffn_gate_inp",
        "feed_forward.experts.*.gate_proj": "ffn_gate_exps",
        "feed_forward.experts.*.up_proj": "ffn_up_exps",
        "feed_forward.experts.*.down_proj": "ffn_down_exps",
    },
    gguf_tensors={"feed_forward.expert_bias": "exp_probs_b.bias"},
    experts="num_local_experts",
    only=LFM2.only
    | {
        "feed_forward.w": ("mlp_layer_types", ("dense",)),
        "feed_forward.gate": ("mlp_layer_types", ("sparse",)),
        "feed_forward.expert": ("mlp_layer_types", ("sparse",)),
    },
    renamed=EXPERTS_BY_NUMBER,
    keys=(
        *LFM2.keys,
        *EXPERT_KEYS,
        Key("expert_feed_forward_length", "moe_intermediate_size"),
        Key("leading_dense_block_count", "num_dense_layers"),
        Key("expert_gating_func", "expert_gating_func", int, SIGMOID),
    ),
    aliases={"num_experts": "num_local_experts"},
    former={"tie_embedding": "tie_word_embeddings"},
    derived=_with_experts,
    reads=(),
    fixed={
        "conv_bias": (False,),
        "norm_topk_prob": (True,),
        "routed_scaling_factor": (1.0,),
        "use_expert_bias": (True,),
    },
)
