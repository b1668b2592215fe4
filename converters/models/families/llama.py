"""Architectures: Llama."""

from __future__ import annotations

from lqexport.converters.models.architecture import GATED, Architecture, ExLlamaV2
from lqexport.converters.models.families.parts import ATTENTION, INTERLEAVED, QKV, RMS_NORM

LLAMA = Architecture(
    family="Llama 1 to 3.3, SmolLM2",
    classes=("LlamaForCausalLM",),
    model_type="llama",
    gguf="llama",
    exl2=ExLlamaV2(),
    linears=(QKV, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)),
    gguf_block={"input_layernorm": "attn_norm", **ATTENTION, "post_attention_layernorm": "ffn_norm", **GATED},
    gguf_top={
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    },
    rows=INTERLEAVED,
    keys=(RMS_NORM,),
    fixed={"hidden_act": ("silu",)},
    flags={"attention_bias": "self_attn.q_proj", "mlp_bias": "mlp.gate_proj"},
    rope_types=("default", "dynamic", "linear", "yarn", "llama3"),
)
