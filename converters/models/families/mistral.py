"""Architectures: Mistral, and the text part of Mistral 3 models with images."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import Config, Key
from lqexport.converters.models.families.deepseek import DEEPSEEK_V3, SOFTMAX
from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import expert_stacks

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


def _mistral4(config: Config) -> Config:
    """Returns what `derived` of DeepSeek V3 returns, and the context length up to which queries have the factor 1."""
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    length = {"original_max_position_embeddings": config.get("max_position_embeddings")}
    return DEEPSEEK_V3.derived(config) | ({name: length | config[name]} if config.get(name) else {})


MISTRAL4 = replace(
    DEEPSEEK_V3,
    family="Mistral 4, Mistral Small 4 (of models with images: the text part)",
    classes=("Mistral4ForCausalLM", "Mistral3ForConditionalGeneration"),
    model_type="mistral4",
    gguf="mistral4",
    when={"model_type": ("mistral4",)},
    gguf_tensors={},
    renamed=MISTRAL.renamed,
    unused=MISTRAL.unused,
    keys=(
        *(key for key in DEEPSEEK_V3.keys if key.config != "expert_gating_func"),
        Key("expert_gating_func", "expert_gating_func", int, SOFTMAX),
        Key("attention.temperature_scale", "llama_4_scaling_beta", float, rope=True),
        Key("attention.temperature_length", "original_max_position_embeddings", rope=True),
    ),
    derived=_mistral4,
    fixed={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "rope_interleave": (True,),
        "n_group": (1,),
        "topk_group": (1,),
        "norm_topk_prob": (True,),
    },
    stacked=expert_stacks("mlp.experts"),
    rope_types=("yarn",),
    only_mscale=1.0,
    partial=True,
)
