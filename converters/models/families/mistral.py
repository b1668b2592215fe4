"""Architectures: Mistral, and the text part of Mistral 3 models with images."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import Key
from lqexport.converters.models.families.llama import LLAMA

MISTRAL = replace(
    LLAMA,
    family="Mistral, Mistral Small 3 (of models with images: the text part)",
    classes=("MistralForCausalLM", "Mistral3ForConditionalGeneration"),
    model_type="mistral",
    when={"model_type": ("mistral", None)},
    renamed={r"^language_model\.lm_head\.": "lm_head.", r"^(model\.)?language_model\.(model\.)?": "model."},
    unused=(*LLAMA.unused, r"vision_tower\.", r"multi_modal_projector\."),
)

MINISTRAL3 = replace(
    MISTRAL,
    family="Ministral 3 (of models with images: the text part)",
    classes=("Ministral3ForCausalLM", "Mistral3ForConditionalGeneration"),
    model_type="ministral3",
    gguf="mistral3",
    exl2=None,
    when={"model_type": ("ministral3",)},
    # Queries are multiplied by 1 + beta * ln(1 + floor(position / original context length)).
    keys=(*LLAMA.keys, Key("attention.temperature_scale", "llama_4_scaling_beta", float, rope=True)),
    flags={},
    rope_types=("yarn",),  # without the original context length, transformers cannot compute the factor of queries
    mscale=1.0,
)
