"""Architectures: Apertus."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import ATTENTION, HEAD_NORMS, UNGATED_LINEARS

APERTUS = replace(
    LLAMA,
    family="Apertus",
    classes=("ApertusForCausalLM",),
    model_type="apertus",
    gguf="apertus",
    exl2=None,
    linears=UNGATED_LINEARS,
    gguf_block={
        "attention_layernorm": "attn_norm",
        **ATTENTION,
        **HEAD_NORMS,
        "feedforward_layernorm": "ffn_norm",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    numbers={f"mlp.act_fn.{name}": f"xielu.{name}" for name in ("alpha_p", "alpha_n", "beta", "eps")},
    shaped={"mlp.act_fn.beta": (), "mlp.act_fn.eps": ()},
    rows={},
    fixed={"hidden_act": ("xielu",), "tie_word_embeddings": (False,)},
    flags={"attention_bias": "self_attn.q_proj"},
)
