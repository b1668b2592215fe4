"""Architectures: Arcee."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import GATED, Config, Key
from lqexport.converters.models.families.deepseek import BESIDE_EXPERTS, SHARED, SIGMOID
from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import (
    ATTENTION,
    EXPERT_LINEARS,
    EXPERTS,
    HEAD_NORMS,
    QKV,
    RMS_NORM,
    UNGATED_BLOCK,
    UNGATED_LINEARS,
)
from lqexport.converters.models.hf_defaults import FULL
from lqexport.converters.models.windows import layer_types

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


def _windows(config: Config) -> Config:
    """Returns the types of the blocks, and n where every n-th block attends to the whole context."""
    period, layers = config.get("global_attn_every_n_layers") or 4, config.get("num_hidden_layers", 0)
    types = config.get("layer_types") or layer_types(period, layers)
    period = types.index(FULL) + 1 if FULL in types else period
    return {"layer_types": types, "global_attn_every_n_layers": period}


AFMOE = replace(
    LLAMA,
    family="Arcee Trinity",
    classes=("AfmoeForCausalLM",),
    model_type="afmoe",
    gguf="afmoe",
    exl2=None,
    linears=((*QKV, "self_attn.gate_proj"), ("self_attn.o_proj",), *BESIDE_EXPERTS, *EXPERT_LINEARS),
    gguf_block={
        "input_layernorm": "attn_norm",
        **ATTENTION,
        **HEAD_NORMS,
        "self_attn.gate_proj": "attn_gate",
        "post_attention_layernorm": "post_attention_norm",
        "pre_mlp_layernorm": "ffn_norm",
        **GATED,
        **SHARED,
        "mlp.router.gate": EXPERTS["mlp.gate"],
        **{module: gguf for module, gguf in EXPERTS.items() if module != "mlp.gate"},
        "post_mlp_layernorm": "post_ffw_norm",
    },
    gguf_tensors={"mlp.expert_bias": "exp_probs_b.bias"},
    experts="num_experts",
    dense="num_dense_layers",
    rows={},
    keys=(
        replace(RMS_NORM, default=1e-5),
        Key("leading_dense_block_count", "num_dense_layers"),
        Key("expert_count", "num_experts"),
        Key("expert_used_count", "num_experts_per_tok"),
        Key("expert_shared_count", "num_shared_experts"),
        Key("expert_feed_forward_length", "moe_intermediate_size"),
        Key("expert_weights_scale", "route_scale", float, 1.0),
        Key("expert_weights_norm", "norm_topk_prob", bool, True),
        Key("expert_gating_func", "expert_gating_func", int, SIGMOID),
    ),
    derived=_windows,
    # llama.cpp multiplies the embedding by the root of hidden_size, and does not rotate every fourth block.
    fixed={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mup_enabled": (True,),
        "global_attn_every_n_layers": (4,),
    },
    flags={},
    rope_types=("default", "dynamic"),
    period=4,
    needs_windows=True,
    adds=False,  # norms come between the outputs and the sum
)
