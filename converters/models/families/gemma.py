"""Architectures: Gemma."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import GATED, ExLlamaV2, Key
from lqexport.converters.models.families.parts import (
    ATTENTION,
    BEFORE_AND_AFTER,
    HEAD_NORMS,
    RMS_NORM,
    rope_of_both_types,
)
from lqexport.converters.models.families.qwen import QWEN2

GEMMA = replace(
    QWEN2,
    family="Gemma 1",
    classes=("GemmaForCausalLM",),
    model_type="gemma",
    gguf="gemma",
    exl2=ExLlamaV2(),
    norm_plus=1,
    # transformers takes "gelu", which the first config.json files have, for the approximation by tanh, too.
    fixed={
        "hidden_act": ("gelu_pytorch_tanh", "gelu"),
        "attention_bias": (False,),
        "tie_word_embeddings": (True,),
        "use_bidirectional_attention": (None, False),
    },
    rope_types=("default", "dynamic", "linear", "yarn"),
)

GEMMA2 = replace(
    QWEN2,
    family="Gemma 2",
    classes=("Gemma2ForCausalLM",),
    model_type="gemma2",
    gguf="gemma2",
    exl2=ExLlamaV2(),
    gguf_block={**BEFORE_AND_AFTER, **ATTENTION, **GATED},
    norm_plus=1,
    adds=False,  # norms come between the outputs and the sum
    keys=(
        RMS_NORM,
        Key("attn_logit_softcapping", "attn_logit_softcapping", float, 50.0),
        Key("final_logit_softcapping", "final_logit_softcapping", float, 30.0),
    ),
    fixed={"hidden_activation": ("gelu_pytorch_tanh",), "attention_bias": (False,), "tie_word_embeddings": (True,)},
    rope_types=("default", "dynamic"),
    period=2,
    needs_windows=True,
    wide_scale=46,
)

GEMMA3 = replace(
    GEMMA2,
    family="Gemma 3 (of models with images: the text part)",
    classes=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    model_type="gemma3_text",
    gguf="gemma3",
    # ExLlamaV2 knows only the model with images; it also loads one without image tensors.
    exl2=ExLlamaV2(renamed={"^": "language_model."}, called="Gemma3ForConditionalGeneration"),
    gguf_block={**BEFORE_AND_AFTER, **ATTENTION, **HEAD_NORMS, **GATED},
    renamed={r"^(model\.)?language_model\.(model\.)?": "model.", r"^model\.lm_head\.": "lm_head."},
    unused=(*GEMMA2.unused, r"vision_tower\.", r"multi_modal_projector\."),
    keys=(RMS_NORM,),
    derived=rope_of_both_types,
    fixed={
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "use_bidirectional_attention": (False,),
    },
    rope_types=("default", "dynamic", "linear"),
    period=6,
    needs_windows=False,
    wide_scale=62,
)
