"""Architectures: Arcee."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import RMS_NORM, UNGATED_BLOCK, UNGATED_LINEARS

ARCEE = replace(
    LLAMA,
    family="Arcee AFM",
    classes=("ArceeForCausalLM",),
    model_type="arcee",
    gguf="arcee",
    exl2=None,
    linears=UNGATED_LINEARS,
    gguf_block=UNGATED_BLOCK,
    keys=(replace(RMS_NORM, default=1e-5),),
    fixed={"hidden_act": ("relu2",), "attention_bias": (False,), "mlp_bias": (False,)},
    flags={},
)
