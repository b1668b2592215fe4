"""Architectures: GLM."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import GATED, PREDICTOR, Config, Key
from lqexport.converters.models.families.deepseek import BESIDE_EXPERTS, DEEPSEEK_V3, ROUTED_KEYS, SHARED, SIGMOID
from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import ATTENTION, EXPERT_LINEARS, EXPERTS, HEAD_NORMS, QKV, RMS_NORM

GLM = replace(
    LLAMA,
    family="GLM-4 (of 2024)",
    classes=("GlmForCausalLM",),
    model_type="glm",
    gguf="chatglm",
    exl2=None,
    linears=(QKV, ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    gguf_block={
        "input_layernorm": "attn_norm",
        **ATTENTION,
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    rows={},  # transformers rotates neighbouring rows, too
    keys=(replace(RMS_NORM, default=1.5625e-7),),
    partial=True,
    flags={"attention_bias": "self_attn.q_proj"},
    rope_types=("default", "dynamic", "linear", "yarn"),
    square_heads=True,
)

GLM4 = replace(
    GLM,
    family="GLM-4-0414, GLM-Z1",
    classes=("Glm4ForCausalLM",),
    model_type="glm4",
    gguf="glm4",
    gguf_block=GLM.gguf_block
    | {"post_self_attn_layernorm": "post_attention_norm", "post_mlp_layernorm": "post_ffw_norm"},
    square_heads=False,
    adds=False,  # norms come between the outputs and the sum
)


GLM4_MOE = replace(
    LLAMA,
    family="GLM-4.5 Air",
    classes=("Glm4MoeForCausalLM",),
    model_type="glm4_moe",
    gguf="glm4moe",
    exl2=None,
    linears=(QKV, ("self_attn.o_proj",), *BESIDE_EXPERTS, *EXPERT_LINEARS),
    when={"use_qk_norm": (False,)},
    gguf_block={
        "input_layernorm": "attn_norm",
        **ATTENTION,
        "post_attention_layernorm": "post_attention_norm",
        **GATED,
        **SHARED,
        **EXPERTS,
    },
    gguf_tensors={"mlp.gate.e_score_correction_bias": "exp_probs_b.bias"},
    experts="n_routed_experts",
    dense="first_k_dense_replace",
    rows={},
    further=True,
    predictor=PREDICTOR,
    keys=(
        RMS_NORM,
        Key("leading_dense_block_count", "first_k_dense_replace"),
        *ROUTED_KEYS,
        Key("expert_weights_norm", "norm_topk_prob", bool, True),
        Key("expert_gating_func", "expert_gating_func", int, SIGMOID),
    ),
    partial=True,
    fixed={"hidden_act": ("silu",), "n_group": (1,), "topk_group": (1,)},
    flags={"attention_bias": "self_attn.q_proj"},
    rope_types=("default", "dynamic"),
)

GLM4_MOE_NORMED = replace(
    GLM4_MOE,
    family="GLM-4.5, GLM-4.6, GLM-4.7",
    when={"use_qk_norm": (True,)},
    gguf_block=GLM4_MOE.gguf_block | HEAD_NORMS,
)


def _glm_lite(config: Config) -> Config:
    """Returns what `derived` of DeepSeek V3 returns, and the types of the blocks' MLPs.

    `first_k_dense_replace` is None where blocks without experts follow blocks with experts.
    """
    layers, leading = config.get("num_hidden_layers", 0), config.get("first_k_dense_replace", 1)
    if (types := config.get("mlp_layer_types")) is not None:
        leading = types.count("dense")
    pattern = ["dense"] * leading + ["sparse"] * (layers - leading)
    fits = types in (None, pattern)
    return DEEPSEEK_V3.derived(config) | {
        "mlp_layer_types": pattern if fits else types,
        "first_k_dense_replace": leading if fits else None,
    }


GLM4_MOE_LITE = replace(
    DEEPSEEK_V3,
    family="GLM-4.7 Flash",
    classes=("Glm4MoeLiteForCausalLM",),
    model_type="glm4_moe_lite",
    derived=_glm_lite,
    rope_types=("default", "dynamic"),
)
