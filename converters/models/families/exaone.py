"""Architectures: EXAONE."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import Key
from lqexport.converters.models.families.deepseek import SIGMOID
from lqexport.converters.models.families.glm import GLM4_MOE_NORMED
from lqexport.converters.models.families.olmo import OLMO2
from lqexport.converters.models.families.parts import RMS_NORM, mlp_types

EXAONE4 = replace(
    OLMO2,
    family="EXAONE 4.0 1.2B",
    classes=("Exaone4ForCausalLM",),
    model_type="exaone4",
    gguf="exaone4",
    # With windows, only the blocks that have them are rotated. llama.cpp does that only in models of 64 blocks.
    fixed={"hidden_act": ("silu",), "sliding_window": (None,)},
    rope_types=("default", "dynamic", "llama3"),
    period=1,
    square_heads=True,
)


EXAONE_MOE = replace(
    GLM4_MOE_NORMED,
    family="K-EXAONE",
    classes=("ExaoneMoeForCausalLM",),
    model_type="exaone_moe",
    gguf="exaone-moe",
    when={},
    gguf_block=GLM4_MOE_NORMED.gguf_block | {"post_attention_layernorm": "ffn_norm"},
    experts="num_experts",
    renamed={r"\.mlp\.e_score_correction_bias$": ".mlp.gate.e_score_correction_bias"},
    further=False,
    predictor={},
    keys=(
        RMS_NORM,
        Key("leading_dense_block_count", "first_k_dense_replace"),
        Key("expert_count", "num_experts"),
        Key("expert_used_count", "num_experts_per_tok"),
        Key("expert_shared_count", "num_shared_experts"),
        Key("expert_feed_forward_length", "moe_intermediate_size"),
        Key("expert_weights_scale", "routed_scaling_factor", float, 1.0),
        Key("expert_weights_norm", "norm_topk_prob", bool, True),
        Key("expert_gating_func", "expert_gating_func", int, SIGMOID),
    ),
    derived=mlp_types,
    partial=False,
    flags={},
    # Blocks that attend to the whole context are not rotated.
    period=4,
    needs_windows=True,
)
