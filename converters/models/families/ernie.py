"""Architectures: ERNIE."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import RMS_NORM

ERNIE = replace(
    LLAMA,
    family="ERNIE 4.5",
    classes=("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"),
    model_type="ernie4_5",
    gguf="ernie4_5",
    exl2=None,
    rows={},  # transformers rotates neighbouring rows, too
    keys=(replace(RMS_NORM, default=1e-5),),
    defaults={"tie_word_embeddings": True, "head_dim": 128},
    fixed={"hidden_act": ("silu",), "use_bias": (False,)},
    flags={},
    rope_types=("default", "dynamic", "linear", "yarn"),
)
