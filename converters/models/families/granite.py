"""Architectures: Granite."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lqexport.converters.models.architecture import Config, Key, Order, Stack
from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import ATTENTION, EXPERT_KEYS, QKV, RMS_NORM
from lqexport.converters.models.families.state_spaces import (
    KEY_HEADS_OF_BLOCKS,
    RECURRENT,
    UNLIMITED,
    block_types,
    key_heads,
    mamba2_modules,
    mamba2_tensors,
    time_step_limit,
)
from lqexport.converters.models.hf_defaults import FULL


def _halves(config: Config) -> dict[str, Order]:
    """Returns the rows of the first linear of the MLP of Granite 4 that are gate_proj, and up_proj."""
    width = config.get("shared_intermediate_size") or 0
    return {"gate_proj": np.arange(width), "up_proj": np.arange(width, 2 * width)}


GRANITE = replace(
    LLAMA,
    family="Granite 3",
    classes=("GraniteForCausalLM",),
    model_type="granite",
    gguf="granite",
    # ExLlamaV2 multiplies scales by residual_multiplier and rounds them again, to numbers that the solver did not see.
    exl2=None,
    adds=False,  # the outputs are multiplied by residual_multiplier first
    keys=(
        RMS_NORM,
        Key("attention.scale", "attention_multiplier", float, 1.0),
        Key("embedding_scale", "embedding_multiplier", float, 1.0),
        Key("residual_scale", "residual_multiplier", float, 1.0),
        Key("logit_scale", "logits_scaling", float, 1.0),
    ),
    # Granite 4 models without state spaces become models of this family.
    parts={"shared_mlp.input_linear": _halves},
    renamed={
        r"\.shared_mlp\.input_linear\.(gate|up)_proj\.": r".mlp.\1_proj.",
        r"\.shared_mlp\.output_linear\.": ".mlp.down_proj.",
    },
    rope_types=("default", "dynamic"),
)


GRANITE_MOE = replace(
    GRANITE,
    family="Granite 3 MoE",
    classes=("GraniteMoeForCausalLM",),
    model_type="granitemoe",
    gguf="granitemoe",
    linears=(
        QKV,
        ("self_attn.o_proj",),
        ("block_sparse_moe.experts.*.gate_proj", "block_sparse_moe.experts.*.up_proj"),
        ("block_sparse_moe.experts.*.down_proj",),
    ),
    gguf_block={
        "input_layernorm": "attn_norm",
        **ATTENTION,
        "post_attention_layernorm": "ffn_norm",
        "block_sparse_moe.router": "ffn_gate_inp",
        "block_sparse_moe.experts.*.gate_proj": "ffn_gate_exps",
        "block_sparse_moe.experts.*.up_proj": "ffn_up_exps",
        "block_sparse_moe.experts.*.down_proj": "ffn_down_exps",
    },
    experts="num_local_experts",
    stacked={
        "block_sparse_moe.input_linear.weight": Stack(
            ("block_sparse_moe.experts.*.gate_proj.weight", "block_sparse_moe.experts.*.up_proj.weight")
        ),
        "block_sparse_moe.output_linear.weight": Stack(("block_sparse_moe.experts.*.down_proj.weight",)),
    },
    parts={},
    renamed={r"\.router\.layer\.": ".router."},
    keys=(*GRANITE.keys, *EXPERT_KEYS),
    flags={"attention_bias": "self_attn.q_proj"},
)


def _is_granite3(config: Config) -> bool:
    """Returns whether all blocks have attention with rotation, and no experts, as in Granite 3."""
    types = block_types(config.get("layer_types") or config.get("layers_block_type"))
    rotated = config.get("position_embedding_type") == "rope"
    return isinstance(types, list) and set(types) == {FULL} and rotated and config.get("num_local_experts") == 0


GRANITE_ATTENTION = replace(
    GRANITE,
    family="Granite 4 with attention alone",
    classes=("GraniteMoeHybridForCausalLM",),
    model_type="granitemoehybrid",
    told=_is_granite3,
    reads=("shared_intermediate_size",),
    derived=lambda config: {
        "architectures": [*GRANITE.classes],
        "model_type": GRANITE.model_type,
        "intermediate_size": config.get("shared_intermediate_size"),
    },
)


def _hybrid(config: Config) -> Config:
    """Returns the types of the blocks, and sizes and settings as llama.cpp wants them.

    Without experts, `intermediate_size` has no effect in transformers, and is the width of the MLP in llama.cpp.
    """
    types = block_types(config.get("layer_types"))
    if types is None and isinstance(layers := config.get("num_hidden_layers"), int):
        types = [RECURRENT] * layers
    inner = config.get("mamba_expand", 0) * config.get("hidden_size", 0)
    size = config.get("mamba_d_head")
    width = {} if config.get("num_local_experts") else {"intermediate_size": config.get("shared_intermediate_size")}
    return (
        {"layer_types": types, "state_space_size": inner, "rotated": config.get("position_embedding_type") == "rope"}
        | {"mamba_d_head": inner // config["mamba_n_heads"] if size == "auto" else size}
        | time_step_limit(config)
        | key_heads(config, types)
        | width
    )


def _from_file(config: Config) -> Config:
    """Returns the values of config.json that follow from what `_hybrid` computes."""
    return {
        "mamba_expand": config["state_space_size"] // config["hidden_size"],
        "mamba_d_head": config["state_space_size"] // config["mamba_n_heads"],
        "position_embedding_type": "rope" if config["rotated"] else "nope",
    }


GRANITE_HYBRID = replace(
    GRANITE,
    family="Granite 4",
    classes=("GraniteMoeHybridForCausalLM",),
    model_type="granitemoehybrid",
    gguf="granitehybrid",
    linears=(
        ("mamba.in_proj",),
        ("mamba.out_proj",),
        QKV,
        ("self_attn.o_proj",),
        ("shared_mlp.input_linear.gate_proj", "shared_mlp.input_linear.up_proj"),
        ("shared_mlp.output_linear",),
    ),
    when={"num_local_experts": (0,)},
    gguf_block={
        "input_layernorm": "attn_norm",
        **mamba2_modules("mamba"),
        **ATTENTION,
        "post_attention_layernorm": "ffn_norm",
        "shared_mlp.input_linear.gate_proj": "ffn_gate",
        "shared_mlp.input_linear.up_proj": "ffn_up",
        "shared_mlp.output_linear": "ffn_down",
    },
    gguf_tensors=mamba2_tensors("mamba"),
    only={"mamba.": ("layer_types", (RECURRENT,)), "self_attn.": ("layer_types", (FULL,))},
    renamed={},
    decays=("mamba.A_log",),
    columns=("mamba.A_log", "mamba.D"),
    grouped={"mamba.norm.weight": "mamba_n_groups"},
    keys=(
        *GRANITE.keys,
        KEY_HEADS_OF_BLOCKS,
        Key("rope.scaling.finetuned", "rotated", bool),
        Key("ssm.conv_kernel", "mamba_d_conv"),
        Key("ssm.state_size", "mamba_d_state"),
        Key("ssm.group_count", "mamba_n_groups"),
        Key("ssm.time_step_rank", "mamba_n_heads"),
        Key("ssm.inner_size", "state_space_size"),
        Key("expert_shared_feed_forward_length", "shared_intermediate_size"),
    ),
    aliases={"layers_block_type": "layer_types"},
    reads=("mamba_expand", "mamba_d_head"),
    derived=_hybrid,
    restored=_from_file,
    fixed=GRANITE.fixed
    | {"mamba_expand": (2,), "mamba_conv_bias": (True,), "mamba_proj_bias": (False,), "time_step_limit": (UNLIMITED,)},
    flags={"attention_bias": "self_attn.q_proj"},
    needs_types=(RECURRENT, FULL),
)

GRANITE_HYBRID_MOE = replace(
    GRANITE_HYBRID,
    family="Granite 4 MoE",
    linears=(*GRANITE_HYBRID.linears, *GRANITE_MOE.linears[-2:]),
    when={},
    gguf_block={module: gguf for module, gguf in GRANITE_HYBRID.gguf_block.items() if "shared_mlp" not in module}
    | {
        "shared_mlp.input_linear.gate_proj": "ffn_gate_shexp",
        "shared_mlp.input_linear.up_proj": "ffn_up_shexp",
        "shared_mlp.output_linear": "ffn_down_shexp",
    }
    | {module: gguf for module, gguf in GRANITE_MOE.gguf_block.items() if "block_sparse_moe" in module},
    experts="num_local_experts",
    stacked=GRANITE_MOE.stacked,
    renamed=GRANITE_MOE.renamed,
    keys=(*GRANITE_HYBRID.keys, *EXPERT_KEYS),
)
