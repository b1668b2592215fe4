"""Architectures: GLM."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import ATTENTION, QKV, RMS_NORM

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
    defaults={"partial_rotary_factor": 0.5},
    flags={"attention_bias": "self_attn.q_proj"},
    rope_types=("default", "dynamic", "linear", "yarn"),
)

GLM4 = replace(
    GLM,
    family="GLM-4-0414, GLM-Z1",
    classes=("Glm4ForCausalLM",),
    model_type="glm4",
    gguf="glm4",
    gguf_block=GLM.gguf_block
    | {"post_self_attn_layernorm": "post_attention_norm", "post_mlp_layernorm": "post_ffw_norm"},
    adds=False,  # norms come between the outputs and the sum
)
