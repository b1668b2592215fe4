"""Architectures: StarCoder2."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import ExLlamaV2
from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import ATTENTION, LAYER_NORM, QKV
from lqexport.converters.models.families.qwen import QWEN2

STARCODER2 = replace(
    QWEN2,
    biased=True,
    family="StarCoder2",
    classes=("Starcoder2ForCausalLM",),
    model_type="starcoder2",
    gguf="starcoder2",
    exl2=ExLlamaV2(
        biased=(*QKV, "self_attn.o_proj", "mlp.c_fc", "mlp.c_proj"), keys={"layer_norm_epsilon": "norm_epsilon"}
    ),
    linears=(QKV, ("self_attn.o_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    gguf_block={
        "input_layernorm": "attn_norm",
        **ATTENTION,
        "post_attention_layernorm": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    },
    gguf_top=LLAMA.gguf_top | {"model.norm.bias": "output_norm.bias"},
    keys=(replace(LAYER_NORM, config="norm_epsilon"),),
    fixed={"hidden_act": ("gelu_pytorch_tanh",), "use_bias": (True,)},
    rope_types=("default", "dynamic"),
)
