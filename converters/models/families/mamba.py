"""Architectures: Mamba and Mamba-2."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import Config, Key
from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import RMS_NORM
from lqexport.converters.models.families.state_spaces import (
    UNLIMITED,
    mamba1_linears,
    mamba1_modules,
    mamba1_tensors,
    mamba2_modules,
    mamba2_tensors,
    time_step_limit,
    time_steps,
)

CONTEXT = 1 << 20
"""The context length of files. Models without attention have no limit; it is that of llama.cpp's converter."""


def _sizes(config: Config) -> Config:
    """Returns sizes as llama.cpp wants them. Those of attention and of an MLP have no effect."""
    inner = config.get("expand", 0) * config.get("hidden_size", 0)
    return {
        "state_space_size": inner,
        "intermediate_size": inner,
        "num_attention_heads": config.get("num_heads"),
        "num_key_value_heads": config.get("num_heads"),
        "max_position_embeddings": CONTEXT,
    } | time_step_limit(config)


def _restored(config: Config, heads: int) -> Config:
    """Returns the sizes of attention and of an MLP as `derived` gives them. llama.cpp's converter writes 0."""
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": config["state_space_size"],
    }


MAMBA2 = replace(
    LLAMA,
    family="Mamba-2",
    classes=("Mamba2ForCausalLM",),
    model_type="mamba2",
    gguf="mamba2",
    exl2=None,
    linears=(("mixer.in_proj",), ("mixer.out_proj",)),
    gguf_block={"norm": "attn_norm", **mamba2_modules("mixer")},
    gguf_tensors=mamba2_tensors("mixer"),
    gguf_top={
        "backbone.embeddings.weight": "token_embd.weight",
        "backbone.norm_f.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    },
    rows={},
    renamed={r"^model\.": "", r"^backbone\.embedding\.": "backbone.embeddings."},
    decays=("mixer.A_log",),
    columns=("mixer.A_log", "mixer.D"),
    grouped={"mixer.norm.weight": "n_groups"},
    keys=(
        replace(RMS_NORM, config="layer_norm_epsilon"),
        Key("ssm.conv_kernel", "conv_kernel"),
        Key("ssm.state_size", "state_size"),
        Key("ssm.group_count", "n_groups"),
        Key("ssm.time_step_rank", "num_heads"),
        Key("ssm.inner_size", "state_space_size"),
    ),
    derived=_sizes,
    restored=lambda config: (
        _restored(config, config["num_heads"]) | {"head_dim": config["state_space_size"] // config["num_heads"]}
    ),
    fixed={
        "hidden_act": ("silu",),
        "expand": (2,),
        "use_bias": (False,),
        "use_conv_bias": (True,),
        "time_step_limit": (UNLIMITED,),
    },
    flags={},
    rope_types=("default",),
    blocks="backbone.layers",
    embedding="backbone.embeddings.weight",
    final_norm="backbone.norm_f",
)


def _sizes_of_mamba1(config: Config) -> Config:
    """Returns sizes as llama.cpp wants them. Those of attention and of an MLP have no effect."""
    inner = config.get("expand", 0) * config.get("hidden_size", 0)
    sizes = {"state_space_size": inner, "intermediate_size": inner, "num_attention_heads": 1, "num_key_value_heads": 1}
    return sizes | {"max_position_embeddings": CONTEXT} | time_steps(config, "time_step_rank")


NORMED_STEPS = "ssm.dt_b_c_rms"
"""The GGUF key that says whether time steps and the numbers beside them are normed."""

MAMBA = replace(
    MAMBA2,
    family="Mamba",
    classes=("MambaForCausalLM",),
    model_type="mamba",
    gguf="mamba",
    linears=mamba1_linears("mixer"),
    rounded=("mixer.dt_proj",),
    gguf_block={"norm": "attn_norm", **mamba1_modules("mixer")},
    gguf_tensors=mamba1_tensors("mixer"),
    columns=(),
    grouped={},
    keys=(
        replace(RMS_NORM, config="layer_norm_epsilon"),
        Key("ssm.conv_kernel", "conv_kernel"),
        Key("ssm.state_size", "state_size"),
        Key("ssm.time_step_rank", "time_step_rank"),
        Key("ssm.inner_size", "state_space_size"),
    ),
    derived=_sizes_of_mamba1,
    restored=lambda config: _restored(config, 1),
    fixed={key: values for key, values in MAMBA2.fixed.items() if key != "time_step_limit"},
)

FALCON_MAMBA = replace(
    MAMBA,
    family="Falcon Mamba with one epsilon for all norms",
    classes=("FalconMambaForCausalLM",),
    model_type="falcon_mamba",
    mark=NORMED_STEPS,
    keys=(*MAMBA.keys, Key(NORMED_STEPS, "normed_steps", bool, True)),
    same={"mixer_rms_eps": "layer_norm_epsilon"},
)
