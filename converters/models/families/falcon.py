"""Architectures: Falcon."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from lqexport.converters.models.architecture import GATED, Architecture, Config, Factor, Key
from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import ATTENTION, LAYER_NORM, QKV, RMS_NORM, four_times
from lqexport.converters.models.families.state_spaces import (
    UNLIMITED,
    mamba2_modules,
    mamba2_tensors,
    time_step_limit,
)

FALCON = Architecture(
    family="Falcon 40B, 180B",
    classes=("FalconForCausalLM",),
    model_type="falcon",
    gguf="falcon",
    linears=(
        ("self_attention.query_key_value",),
        ("self_attention.dense",),
        ("mlp.dense_h_to_4h",),
        ("mlp.dense_4h_to_h",),
    ),
    when={"new_decoder_architecture": (True,)},
    gguf_block={
        "ln_attn": "attn_norm_2",
        "ln_mlp": "attn_norm",
        "self_attention.query_key_value": "attn_qkv",
        "self_attention.dense": "attn_output",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
    },
    gguf_top={
        "transformer.word_embeddings.weight": "token_embd.weight",
        "transformer.ln_f.weight": "output_norm.weight",
        "transformer.ln_f.bias": "output_norm.bias",
        "lm_head.weight": "output.weight",
    },
    rows={"self_attention.query_key_value": ("qkv", "num_key_value_heads")},
    keys=(replace(LAYER_NORM, config="layer_norm_epsilon"),),
    aliases={"ffn_hidden_size": "intermediate_size", "num_kv_heads": "num_key_value_heads"},
    derived=four_times,
    fixed={"activation": ("gelu",), "alibi": (False,), "bias": (False,), "parallel_attn": (True,)},
    free_heads=False,
    blocks="transformer.h",
    embedding="transformer.word_embeddings.weight",
    final_norm="transformer.ln_f",
    rope_types=("default", "dynamic"),
)

FALCON_7B = replace(
    FALCON,
    family="Falcon 7B",
    when={"new_decoder_architecture": (False, None)},
    gguf_block={"input_layernorm": "attn_norm"}
    | {module: name for module, name in FALCON.gguf_block.items() if module not in ("ln_attn", "ln_mlp")},
    # The model has one key head, whatever number its config.json gives.
    derived=lambda config: four_times(config) | {"num_key_value_heads": 1},
    fixed=FALCON.fixed | {"multi_query": (True,)},
)


_ONES: dict[str, Any] = {
    "embedding_multiplier": 1.0,
    "lm_head_multiplier": 1.0,
    "attention_in_multiplier": 1.0,
    "attention_out_multiplier": 1.0,
    "key_multiplier": 1.0,
    "ssm_in_multiplier": 1.0,
    "ssm_out_multiplier": 1.0,
    "mlp_multipliers": [1.0, 1.0],
    "ssm_multipliers": [1.0, 1.0, 1.0, 1.0, 1.0],
}
"""The multipliers of Falcon-H1, where they change nothing."""


def _inner(config: Config) -> int:
    """Returns the width of the state space model."""
    width = config.get("mamba_d_ssm")
    return int(config.get("mamba_expand", 0) * config.get("hidden_size", 0) if width is None else width)


def _factors(config: Config) -> dict[str, Factor]:
    """Returns the multipliers of Falcon-H1 by the tensors that they become parts of, as in llama.cpp's files."""
    given = {key: config[key] if config.get(key) is not None else ones for key, ones in _ONES.items()}
    inner, states = _inner(config), config["mamba_n_groups"] * config["mamba_d_state"]
    runs = (inner, inner, states, states, config["mamba_n_heads"])
    rows = np.repeat(np.array(given["ssm_multipliers"], np.float32), runs)
    attention, (gate, down) = given["attention_in_multiplier"], given["mlp_multipliers"]
    return {
        "model.embed_tokens.weight": given["embedding_multiplier"],
        "lm_head.weight": given["lm_head_multiplier"],
        "self_attn.q_proj.weight": attention,
        "self_attn.k_proj.weight": attention * given["key_multiplier"],
        "self_attn.v_proj.weight": attention,
        "self_attn.o_proj.weight": given["attention_out_multiplier"],
        "mamba.in_proj.weight": rows * np.float32(given["ssm_in_multiplier"]),
        "mamba.out_proj.weight": given["ssm_out_multiplier"],
        "feed_forward.gate_proj.weight": gate,
        "feed_forward.down_proj.weight": down,
    }


def _without_multipliers(config: Config) -> Config:
    """Returns multipliers of 1, since the weights hold them, and sizes as llama.cpp wants them."""
    inner, size = _inner(config), config.get("mamba_d_head")
    return (
        _ONES
        | {"mamba_d_ssm": inner, "mamba_d_head": inner // config["mamba_n_heads"] if size == "auto" else size}
        | {"normed_states": [bool(config.get("mamba_rms_norm"))] * config.get("num_hidden_layers", 0)}
        | ({} if config.get("mamba_rms_norm") else {"mamba_norm_before_gate": False})  # there is no norm
        | time_step_limit(config)
    )


FALCON_H1 = replace(
    LLAMA,
    family="Falcon-H1",
    classes=("FalconH1ForCausalLM",),
    model_type="falcon_h1",
    gguf="falcon-h1",
    exl2=None,
    linears=(
        ("mamba.in_proj",),
        ("mamba.out_proj",),
        QKV,
        ("self_attn.o_proj",),
        ("feed_forward.gate_proj", "feed_forward.up_proj"),
        ("feed_forward.down_proj",),
    ),
    gguf_block={
        "input_layernorm": "attn_norm",
        **mamba2_modules("mamba"),
        **ATTENTION,
        **{module.replace("mlp.", "feed_forward."): gguf for module, gguf in GATED.items()},
    },
    # llama.cpp's name of this norm has no `.weight` at its end.
    gguf_tensors={**mamba2_tensors("mamba"), "pre_ff_layernorm.weight": "ffn_norm"},
    gguf_top={name.replace("model.norm", "model.final_layernorm"): gguf for name, gguf in LLAMA.gguf_top.items()},
    only={"mamba.norm": ("normed_states", (True,))},
    rows={},
    decays=("mamba.A_log",),
    columns=("mamba.A_log", "mamba.D"),
    grouped={"mamba.norm.weight": "mamba_n_groups"},
    keys=(
        replace(RMS_NORM, default=1e-5),
        Key("ssm.conv_kernel", "mamba_d_conv"),
        Key("ssm.state_size", "mamba_d_state"),
        Key("ssm.group_count", "mamba_n_groups"),
        Key("ssm.time_step_rank", "mamba_n_heads"),
        Key("ssm.inner_size", "mamba_d_ssm"),
    ),
    reads=("mamba_expand", "mamba_d_head", "mamba_rms_norm", *_ONES),
    folded=_factors,
    derived=_without_multipliers,
    restored=lambda config: {
        "mamba_d_head": config["mamba_d_ssm"] // config["mamba_n_heads"],
        "mamba_rms_norm": any(config["normed_states"]),
    },
    fixed=LLAMA.fixed
    | {key: (value,) for key, value in _ONES.items()}
    | {
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "projectors_bias": (False,),
        "mamba_conv_bias": (True,),
        "mamba_proj_bias": (False,),
        "mamba_norm_before_gate": (False,),
        "time_step_limit": (UNLIMITED,),
    },
    flags={},
    rope_types=("default", "dynamic"),
    final_norm="model.final_layernorm",
)
