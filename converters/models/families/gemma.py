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

GEMMA3_SIZES = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
"""transformers' defaults for the sizes that a config.json leaves out, as those of Gemma 3 models with images do."""


GEMMA = replace(
    QWEN2,
    family="Gemma 1",
    classes=("GemmaForCausalLM",),
    model_type="gemma",
    gguf="gemma",
    exl2=ExLlamaV2(),
    norm_plus=1,
    defaults={"tie_word_embeddings": True, "head_dim": 256},
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
    defaults={"tie_word_embeddings": True, "head_dim": 256},
    fixed={"hidden_activation": ("gelu_pytorch_tanh",), "attention_bias": (False,), "tie_word_embeddings": (True,)},
    rope_types=("default", "dynamic"),
    period=2,
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
    renamed={r"^(model\.)?language_model\.(model\.)?": "model."},
    unused=(*GEMMA2.unused, r"vision_tower\.", r"multi_modal_projector\."),
    keys=(RMS_NORM,),
    defaults=GEMMA2.defaults | GEMMA3_SIZES,
    derived=rope_of_both_types,
    fixed=GEMMA2.fixed
    | {"attn_logit_softcapping": (None,), "final_logit_softcapping": (None,), "use_bidirectional_attention": (False,)},
    rope_types=("default", "dynamic", "linear"),
    period=6,
    wide_scale=62,
)
