"""Architectures: ERNIE."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import GATED, Config, Key
from lqexport.converters.models.families.deepseek import BESIDE_EXPERTS, SHARED
from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import ATTENTION, EXPERT_LINEARS, EXPERTS, QKV, RMS_NORM

ERNIE = replace(
    LLAMA,
    family="ERNIE 4.5",
    classes=("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"),
    model_type="ernie4_5",
    gguf="ernie4_5",
    exl2=None,
    rows={},  # transformers rotates neighbouring rows, too
    keys=(replace(RMS_NORM, default=1e-5),),
    fixed={"hidden_act": ("silu",), "use_bias": (False,)},
    flags={},
    rope_types=("default", "dynamic", "linear", "yarn"),
)


def _ernie_experts(config: Config) -> Config:
    """Returns the width of the shared experts together, and -1 where experts go on to the last block."""
    last = (-1, config.get("num_hidden_layers", 0) - 1)
    return {
        "shared_expert_intermediate_size": config.get("moe_intermediate_size", 0) * config["moe_num_shared_experts"],
        "moe_layer_end_index": -1 if config["moe_layer_end_index"] in last else config["moe_layer_end_index"],
    }


ERNIE_MOE = replace(
    LLAMA,
    family="ERNIE 4.5 MoE",
    classes=("Ernie4_5_MoeForCausalLM",),
    model_type="ernie4_5_moe",
    gguf="ernie4_5-moe",
    exl2=None,
    linears=(QKV, ("self_attn.o_proj",), *BESIDE_EXPERTS, *EXPERT_LINEARS),
    gguf_block={
        "input_layernorm": "attn_norm",
        **ATTENTION,
        "post_attention_layernorm": "ffn_norm",
        **GATED,
        **SHARED,
        **EXPERTS,
    },
    gguf_tensors={"mlp.gate.moe_statics.e_score_correction_bias": "exp_probs_b.bias"},
    one_row=("mlp.gate.moe_statics.e_score_correction_bias",),
    experts="moe_num_experts",
    dense="moe_layer_start_index",
    rows={},  # transformers rotates neighbouring rows, too
    renamed={r"\.mlp\.moe_statics\.": ".mlp.gate.moe_statics."},
    keys=(
        RMS_NORM,
        Key("leading_dense_block_count", "moe_layer_start_index"),
        Key("interleave_moe_layer_step", "moe_layer_interval"),
        Key("expert_count", "moe_num_experts"),
        Key("expert_used_count", "num_experts_per_tok"),
        Key("expert_shared_count", "moe_num_shared_experts"),
        Key("expert_feed_forward_length", "moe_intermediate_size"),
        Key("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
    ),
    aliases={"moe_k": "num_experts_per_tok"},
    derived=_ernie_experts,
    fixed={
        "hidden_act": ("silu",),
        "use_bias": (False,),
        "moe_layer_interval": (1,),
        "moe_layer_end_index": (-1,),
        "moe_norm_min": (1e-12,),
    },
    flags={},
    rope_types=("default", "dynamic"),
)

ERNIE_MOE_WITHOUT_SHARED = replace(
    ERNIE_MOE,
    family="ERNIE 4.5 MoE without shared experts",
    when={"moe_num_shared_experts": (0,)},
    linears=tuple(group for group in ERNIE_MOE.linears if not SHARED.keys() & set(group)),
    gguf_block={module: name for module, name in ERNIE_MOE.gguf_block.items() if module not in SHARED},
    keys=tuple(key for key in ERNIE_MOE.keys if "shared" not in key.name),
)
