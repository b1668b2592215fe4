"""Architectures: Jamba, whose blocks have Mamba or attention, and an MLP or experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lqexport.converters.models.architecture import Config, Key
from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import ATTENTION, QKV, RMS_NORM, expert_stacks
from lqexport.converters.models.families.state_spaces import (
    KEY_HEADS_OF_BLOCKS,
    RECURRENT,
    key_heads,
    mamba1_linears,
    mamba1_modules,
    mamba1_tensors,
    time_steps,
)
from lqexport.converters.models.hf_defaults import FULL

_MLP = ("feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj")


def _every(config: Config, name: str) -> list[bool]:
    """Returns for each block whether it is one of those that `name`_layer_period and `name`_layer_offset choose."""
    period, offset = (config.get(f"{name}_layer_{part}") for part in ("period", "offset"))
    return [layer % (period or 1) == offset for layer in range(config.get("num_hidden_layers", 0))]


def _blocks(config: Config) -> Config:
    """Returns what each block has, and sizes as llama.cpp wants them."""
    types = [FULL if chosen else RECURRENT for chosen in _every(config, "attn")]
    several = (config.get("num_experts") or 1) > 1
    return (
        {"block_types": types, "with_experts": [several and chosen for chosen in _every(config, "expert")]}
        | {"state_space_size": config.get("mamba_expand", 0) * config.get("hidden_size", 0)}
        | time_steps(config, "mamba_dt_rank")
        | key_heads(config, types)
    )


def _chosen(values: list[Any], name: str) -> Config:
    """Returns the period and the offset by which config.json chooses the blocks where `values` is true."""
    chosen = [layer for layer, value in enumerate(values) if value] or [0]
    period = chosen[1] - chosen[0] if len(chosen) > 1 else max(len(values), 1)
    return {f"{name}_layer_period": period, f"{name}_layer_offset": chosen[0]}


JAMBA = replace(
    LLAMA,
    family="Jamba without experts (Jamba Reasoning 3B)",
    classes=("JambaForCausalLM",),
    model_type="jamba",
    gguf="jamba",
    exl2=None,
    when={"num_experts": (1,)},
    linears=(
        *mamba1_linears("mamba"),
        QKV,
        ("self_attn.o_proj",),
        ("feed_forward.gate_proj", "feed_forward.up_proj"),
        ("feed_forward.down_proj",),
    ),
    rounded=("mamba.dt_proj",),
    gguf_block={
        "input_layernorm": "attn_norm",
        **mamba1_modules("mamba"),
        "mamba.dt_layernorm": "ssm_dt_norm",
        "mamba.b_layernorm": "ssm_b_norm",
        "mamba.c_layernorm": "ssm_c_norm",
        **ATTENTION,
        "pre_ff_layernorm": "ffn_norm",
        "feed_forward.gate_proj": "ffn_gate",
        "feed_forward.up_proj": "ffn_up",
        "feed_forward.down_proj": "ffn_down",
    },
    gguf_tensors=mamba1_tensors("mamba"),
    gguf_top={
        "model.embed_tokens.weight": "token_embd.weight",
        "model.final_layernorm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    },
    only={"mamba.": ("block_types", (RECURRENT,)), "self_attn.": ("block_types", (FULL,))},
    rows={},
    decays=("mamba.A_log",),
    keys=(
        RMS_NORM,
        KEY_HEADS_OF_BLOCKS,
        Key("ssm.conv_kernel", "mamba_d_conv"),
        Key("ssm.state_size", "mamba_d_state"),
        Key("ssm.time_step_rank", "mamba_dt_rank"),
        Key("ssm.inner_size", "state_space_size"),
    ),
    reads=("mamba_expand", *(f"{name}_layer_{part}" for name in ("attn", "expert") for part in ("period", "offset"))),
    derived=_blocks,
    restored=lambda config: _chosen([each == FULL for each in config["block_types"]], "attn"),
    fixed={"hidden_act": ("silu",), "mamba_expand": (2,), "mamba_conv_bias": (True,), "mamba_proj_bias": (False,)},
    flags={},
    rope_types=("default",),
    needs_types=(RECURRENT, FULL),
    final_norm="model.final_layernorm",
)

JAMBA_MOE = replace(
    JAMBA,
    family="Jamba (Mini, Large)",
    when={},
    linears=(
        *JAMBA.linears,
        ("feed_forward.experts.*.gate_proj", "feed_forward.experts.*.up_proj"),
        ("feed_forward.experts.*.down_proj",),
    ),
    gguf_block=JAMBA.gguf_block
    | {
        "feed_forward.router": "ffn_gate_inp",
        "feed_forward.experts.*.gate_proj": "ffn_gate_exps",
        "feed_forward.experts.*.up_proj": "ffn_up_exps",
        "feed_forward.experts.*.down_proj": "ffn_down_exps",
    },
    experts="num_experts",
    stacked=expert_stacks("feed_forward.experts"),
    only=JAMBA.only
    | {"feed_forward.experts.": ("with_experts", (True,)), "feed_forward.router": ("with_experts", (True,))}
    | dict.fromkeys(_MLP, ("with_experts", (False,))),
    keys=(*JAMBA.keys, Key("expert_count", "num_experts"), Key("expert_used_count", "num_experts_per_tok")),
    restored=lambda config: JAMBA.restored(config) | _chosen(config["with_experts"], "expert"),
)
