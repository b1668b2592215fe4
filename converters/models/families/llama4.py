"""Architectures: Llama 4."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import Config, Key
from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import ATTENTION, EXPERT_KEYS, QKV, RMS_NORM, expert_stacks

MODULES = ("gate_proj", "up_proj", "down_proj")
EXPERTS = ("moe_blocks", (True,))
"""The key of `only` that says which blocks have experts, and its value for these. Llama 4's files do not have it."""


def _mlp(module: str, ending: str) -> dict[str, str]:
    """Returns the modules of a gated MLP by their names in GGUF, which have an ending."""
    return {f"{module}{name}": f"ffn_{name.removesuffix('_proj')}{ending}" for name in MODULES}


def _blocks(config: Config) -> Config:
    """Returns which blocks have experts, by `interleave_moe_layer_step`, and what llama.cpp derives from other keys.

    llama.cpp gives queries and keys a norm without weights unless there are 128 experts (`use_kq_norm`), and every
    fourth block attends to the whole context.
    """
    layers, step = config.get("num_hidden_layers") or 0, config.get("interleave_moe_layer_step") or 1
    moe = [(layer + 1) % step == 0 for layer in range(layers)]
    return {
        "moe_blocks": moe,
        "usual_moe_layers": [layer for layer, has_experts in enumerate(moe) if has_experts],
        "usual_layer_types": ["chunked_attention" if (layer + 1) % 4 else "full_attention" for layer in range(layers)],
        "usual_qk_norm": config.get("num_local_experts") != 128,
    }


def _restored(config: Config) -> Config:
    usual = _blocks(config)
    return {"moe_layers": usual["usual_moe_layers"], "use_qk_norm": usual["usual_qk_norm"]}


LLAMA4 = replace(
    LLAMA,
    family="Llama 4 Scout, Maverick (of models with images: the text part)",
    classes=("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
    model_type="llama4_text",
    gguf="llama4",
    exl2=None,
    linears=(
        QKV,
        ("self_attn.o_proj",),
        ("feed_forward.gate_proj", "feed_forward.up_proj"),
        ("feed_forward.down_proj",),
        ("feed_forward.shared_expert.gate_proj", "feed_forward.shared_expert.up_proj"),
        ("feed_forward.shared_expert.down_proj",),
        ("feed_forward.experts.*.gate_proj", "feed_forward.experts.*.up_proj"),
        ("feed_forward.experts.*.down_proj",),
    ),
    gguf_block={
        "input_layernorm": "attn_norm",
        **ATTENTION,
        "post_attention_layernorm": "ffn_norm",
        **_mlp("feed_forward.", ""),
        "feed_forward.router": "ffn_gate_inp",
        **_mlp("feed_forward.shared_expert.", "_shexp"),
        **_mlp("feed_forward.experts.*.", "_exps"),
    },
    experts="num_local_experts",
    only={
        **{f"feed_forward.{name}": ("moe_blocks", (False,)) for name in MODULES},
        **{f"feed_forward.{name}": EXPERTS for name in ("router", "shared_expert", "experts")},
    },
    stacked=expert_stacks("feed_forward.experts", transposed=True),
    rows={},
    keys=(
        RMS_NORM,
        *EXPERT_KEYS,
        Key("expert_feed_forward_length", "intermediate_size"),
        Key("feed_forward_length", "intermediate_size_mlp"),
        Key("interleave_moe_layer_step", "interleave_moe_layer_step"),
    ),
    derived=_blocks,
    restored=_restored,
    fixed={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "attention_chunk_size": (8192,),
        "attn_temperature_tuning": (True, 4),
        "attn_scale": (0.1,),
        "floor_scale": (8192,),
        "no_rope_layer_interval": (4,),
    },
    same={
        "moe_layers": "usual_moe_layers",
        "layer_types": "usual_layer_types",
        "use_qk_norm": "usual_qk_norm",
    },
    flags={},
    rope_types=("default", "llama3"),
)
