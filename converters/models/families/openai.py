"""Architectures: OpenAI."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import Key, Stack
from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import (
    ALL_EXPERTS_LINEARS,
    ATTENTION,
    EXPERT_KEYS,
    EXPERT_LINEARS,
    EXPERTS,
    RMS_NORM,
)

PARTS = {"": "weight", "_bias": "bias", "_blocks": "weight_blocks", "_scales": "weight_scales"}
"""The end of the name of a tensor that holds all experts -> the parameter of each expert, in bfloat16 and in MXFP4."""


def _stacks() -> dict[str, Stack]:
    """Returns the tensors of a checkpoint that hold all experts of a block. Weights in bfloat16 are transposed."""
    return {
        f"mlp.experts.{stored}{end}": Stack(
            tuple(f"{linear}.{parameter}" for linear in linears), interleaved=len(linears) > 1, transposed=end == ""
        )
        for stored, linears in zip(("gate_up_proj", "down_proj"), EXPERT_LINEARS, strict=True)
        for end, parameter in PARTS.items()
    }


GPT_OSS = replace(
    LLAMA,
    family="gpt-oss",
    classes=("GptOssForCausalLM",),
    model_type="gpt_oss",
    gguf="gpt-oss",
    exl2=None,
    linears=ALL_EXPERTS_LINEARS,
    gguf_block={
        "input_layernorm": "attn_norm",
        **ATTENTION,
        "post_attention_layernorm": "post_attention_norm",
        "mlp.router": EXPERTS["mlp.gate"],
        **{module: gguf for module, gguf in EXPERTS.items() if module != "mlp.gate"},
    },
    gguf_tensors={"self_attn.sinks": "attn_sinks.weight"},
    experts="num_local_experts",
    stacked=_stacks(),
    rows={},
    keys=(RMS_NORM, *EXPERT_KEYS, Key("expert_feed_forward_length", "intermediate_size")),
    aliases={"experts_per_token": "num_experts_per_tok"},
    fixed={
        "attention_bias": (True,),
        "swiglu_alpha": (1.702,),
        "swiglu_limit": (7.0,),
        "tie_word_embeddings": (False,),
    },
    flags={},
    rope_types=("default", "yarn"),
    unrounded_yarn=True,
    period=2,
    needs_windows=True,
)
