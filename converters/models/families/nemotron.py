"""Architectures: Nemotron."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import LAYER_NORM, UNGATED_BLOCK, UNGATED_LINEARS

NEMOTRON = replace(
    LLAMA,
    family="Nemotron 4, Minitron 4B",
    classes=("NemotronForCausalLM",),
    model_type="nemotron",
    gguf="nemotron",
    exl2=None,
    linears=UNGATED_LINEARS,
    gguf_block=UNGATED_BLOCK,
    gguf_top=LLAMA.gguf_top | {"model.norm.bias": "output_norm.bias"},
    rows={},
    norm_plus=1,
    keys=(replace(LAYER_NORM, config="norm_eps"),),
    partial=True,
    fixed={"hidden_act": ("relu2",), "tie_word_embeddings": (False,)},
    flags={"attention_bias": "self_attn.q_proj", "mlp_bias": "mlp.up_proj"},
    rope_types=("default", "dynamic"),
    square_heads=True,
)
