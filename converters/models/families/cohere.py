"""Architectures: Cohere."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import GATED, Key
from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import ATTENTION, LAYER_NORM

COHERE = replace(
    LLAMA,
    family="Cohere Command R, Aya 23",
    classes=("CohereForCausalLM",),
    model_type="cohere",
    gguf="command-r",
    exl2=None,
    gguf_block={"input_layernorm": "attn_norm", **ATTENTION, **GATED},
    rows={},  # both rotate neighbouring rows
    keys=(LAYER_NORM, Key("logit_scale", "logit_scale", float, 0.0625)),
    fixed={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "use_qk_norm": (False,),
        "tie_word_embeddings": (True,),
    },
    flags={},
    rope_types=("default", "dynamic"),
    free_heads=False,
)

COHERE2 = replace(
    COHERE,
    family="Cohere Command R7B, Command A",
    classes=("Cohere2ForCausalLM",),
    model_type="cohere2",
    gguf="cohere2",
    fixed={key: values for key, values in COHERE.fixed.items() if key != "use_qk_norm"},
    period=4,
    needs_windows=True,
    free_heads=True,
    square_heads=True,
)
