"""Architectures: GLM."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import GATED, PREDICTOR, Config, Key
from lqexport.converters.models.families.deepseek import (
    BESIDE_EXPERTS,
    DEEPSEEK_V3,
    DEEPSEEK_V32,
    INDEXER,
    ROUTED_KEYS,
    SHARED,
    SIGMOID,
    with_mlp_types,
)
from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import ATTENTION, EXPERT_LINEARS, EXPERTS, HEAD_NORMS, QKV, RMS_NORM
from lqexport.errors import UserError

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


GLM4_MOE_LITE = replace(
    DEEPSEEK_V3,
    family="GLM-4.7 Flash",
    classes=("Glm4MoeLiteForCausalLM",),
    model_type="glm4_moe_lite",
    derived=with_mlp_types,
    rope_types=("default", "dynamic"),
)


def _glm5(config: Config) -> Config:
    """Returns what `derived` of DeepSeek V3.2 returns, and which blocks choose tokens ("full").

    Raises UserError if the first block takes the choice of an earlier one.
    """
    given = config.get("indexer_types")
    types = given if isinstance(given, list) else _glm5_pattern(config)
    if types[:1] == ["shared"]:
        raise UserError("config.json: the first of indexer_types is 'shared', and no block comes before it.")
    return with_mlp_types(config) | {"indexer_types": types, "chooses": [int(each == "full") for each in types]}


def _glm5_pattern(config: Config) -> list[str]:
    """Returns `indexer_types` where config.json gives a pattern or a frequency, as transformers does."""
    if (pattern := config.get("index_topk_pattern")) is not None:
        return [{"F": "full", "S": "shared"}.get(each, each) for each in pattern]
    every, offset = max(config.get("index_topk_freq") or 1, 1), config.get("index_skip_topk_offset", 2)
    layers = config.get("num_hidden_layers", 0)
    return ["shared" if max(block - offset + 1, 0) % every else "full" for block in range(layers)]


def _glm5_restored(config: Config) -> Config:
    """Returns which blocks choose tokens: those whose tensors for it a file has."""
    return {"indexer_types": [each or "shared" for each in config["indexer_types"]]}


def _glm5_carried(config: Config) -> int:
    """Returns the number of columns of a choice of tokens, if some block uses that of an earlier one."""
    return int(config["index_topk"]) if "shared" in config["indexer_types"] else 0


GLM_DSA = replace(
    DEEPSEEK_V32,
    family="GLM-5",
    classes=("GlmMoeDsaForCausalLM",),
    model_type="glm_moe_dsa",
    gguf="glm-dsa",
    only={INDEXER: ("indexer_types", ("full",))},
    predicts_like=("full",),
    shares_choices=True,
    carried=_glm5_carried,
    keys=(*DEEPSEEK_V32.keys, Key("attention.indexer.types", "chooses", default=1, many=True)),
    derived=_glm5,
    restored=_glm5_restored,
    rope_types=("default", "dynamic"),  # with yarn, whatever mscale, llama.cpp computes other logits
)
