"""Architectures: Xiaomi's MiMo."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import GATED, KEY_HEADS, PREDICTOR, Config, Key
from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import ATTENTION, EXPERT_LINEARS, EXPERTS, QKV, RMS_NORM
from lqexport.converters.models.hf_defaults import FULL, SLIDING, default_rope

SHARE = "partial_rotary_factor"
DENSE, SPARSE = "dense", "sparse"


def _blocks(config: Config) -> Config:
    """Returns what each block has, as transformers' config class computes it, and its number of key heads.

    Blocks with a sliding window have twice as many key heads, and sinks. transformers takes only nested rotary settings
    and counts the token itself to a window that is given as `sliding_window_size`.
    """
    layers, heads = config.get("num_hidden_layers", 0), config.get("num_key_value_heads", 0)
    usual = [FULL if layer == 0 or (layer + 1) % 6 == 0 else SLIDING for layer in range(layers)]
    types = config.get("layer_types") or usual
    before = config.get("sliding_window_size")
    rope = config.get("rope_parameters") or default_rope(MIMO2)
    rope = {name: {SHARE: 0.334, **settings} for name, settings in rope.items() if isinstance(settings, dict)}
    return {
        "layer_types": types,
        "mlp_layer_types": config.get("mlp_layer_types") or [DENSE, *[SPARSE] * (layers - 1)],
        "with_sinks": [each == SLIDING for each in types],
        "key_heads_in_windows": heads * 2,
        "key_heads": [heads * 2 if each == SLIDING else heads for each in types],
        "sliding_window": config.get("sliding_window") if before is None else before + 1,
        "rope_parameters": rope,
        "one_rotated_share": len({settings[SHARE] for settings in rope.values()}) == 1,
    }


def _from_file(config: Config) -> Config:
    """Returns the number of key heads of blocks without a window, and the rotated share for both types of blocks."""
    rope, sliding = config["rope_parameters"], SLIDING in config["layer_types"]
    rope[SLIDING][SHARE] = rope[FULL][SHARE]
    return {"num_key_value_heads": max(config["key_heads"]) // (2 if sliding else 1), "rope_parameters": rope}


MIMO2 = replace(
    LLAMA,
    family="MiMo V2 Flash",
    classes=("MiMoV2FlashForCausalLM",),
    model_type="mimo_v2_flash",
    gguf="mimo2",
    exl2=None,
    linears=(QKV, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",), *EXPERT_LINEARS),
    gguf_block={
        "input_layernorm": "attn_norm",
        **ATTENTION,
        "post_attention_layernorm": "ffn_norm",
        **GATED,
        **EXPERTS,
    },
    gguf_tensors={
        "self_attn.sinks": "attn_sinks.weight",
        "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    },
    only={
        "self_attn.sinks": ("with_sinks", (True,)),
        "mlp.": ("mlp_layer_types", (DENSE,)),
        "mlp.gate": ("mlp_layer_types", (SPARSE,)),
        "mlp.gate_proj": ("mlp_layer_types", (DENSE,)),
        "mlp.experts.": ("mlp_layer_types", (SPARSE,)),
    },
    experts="n_routed_experts",
    rows={},
    renamed={
        r"\.attention_sink_bias$": ".sinks",
        r"^(model\.mtp\.layers\.\d+\.)pre_mlp_layernorm\.": r"\1post_attention_layernorm.",
        r"^(model\.mtp\.layers\.\d+\.)final_layernorm\.": r"\1shared_head.norm.",
    },
    further=True,
    predictor=PREDICTOR | {"self_attn.qkv_proj": "attn_qkv"},
    predicts_like=(True, DENSE, SLIDING),
    joins={"self_attn.qkv_proj": QKV},
    keys=(
        RMS_NORM,
        Key(KEY_HEADS, "key_heads", many=True, further="key_heads_in_windows"),
        Key("attention.value_length", "v_head_dim"),
        Key("attention.value_scale", "attention_value_scale", float, 1.0),
        Key("expert_count", "n_routed_experts"),
        Key("expert_used_count", "num_experts_per_tok"),
        Key("expert_feed_forward_length", "moe_intermediate_size"),
    ),
    derived=_blocks,
    restored=_from_file,
    fixed={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "tie_word_embeddings": (False,),
        "n_group": (1,),
        "topk_group": (1,),
        "norm_topk_prob": (True,),
        "routed_scaling_factor": (1.0, None),
        "one_rotated_share": (True,),
    },
    flags={},
    rope_types=("default",),
    partial=True,
    any_windows=True,
    needs_windows=True,
)
