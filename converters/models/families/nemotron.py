"""Architectures: Nemotron."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import PREDICTOR, Config, Key
from lqexport.converters.models.families.deepseek import ROUTED_KEYS
from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import LAYER_NORM, RMS_NORM, UNGATED_BLOCK, UNGATED_LINEARS
from lqexport.converters.models.families.state_spaces import (
    KEY_HEADS_OF_BLOCKS,
    RECURRENT,
    block_types,
    key_heads,
    mamba2_modules,
    mamba2_tensors,
)
from lqexport.converters.models.hf_defaults import FULL

NEMOTRON = replace(
    LLAMA,
    family="Nemotron 4, Minitron 4B",
    classes=("NemotronForCausalLM",),
    model_type="nemotron",
    gguf="nemotron",
    exl2=None,
    linears=UNGATED_LINEARS,
    gguf_block=UNGATED_BLOCK,
    gguf_top=LLAMA.gguf_top | {"model.norm.bias": "output_norm.bias"},
    rows={},
    norm_plus=1,
    keys=(replace(LAYER_NORM, config="norm_eps"),),
    partial=True,
    fixed={"hidden_act": ("relu2",), "tie_word_embeddings": (False,)},
    flags={"attention_bias": "self_attn.q_proj", "mlp_bias": "mlp.up_proj"},
    rope_types=("default", "dynamic"),
    square_heads=True,
)


PATTERN = {"M": RECURRENT, "E": "moe", "*": FULL, "-": "mlp"}
"""Letter of `hybrid_override_pattern` of config.json -> the type of a block."""


def _types(config: Config) -> list[str] | None:
    """Returns the types of the blocks. The last alternative is transformers' default."""
    types, pattern = config.get("layer_types") or config.get("layers_block_type"), config.get("hybrid_override_pattern")
    if types is None and isinstance(pattern, str):
        types = [PATTERN.get(letter, letter) for letter in pattern]
    return block_types(types or list(PATTERN.values()))


def _hybrid(config: Config) -> Config:
    """Returns the types of the blocks, their number, and sizes as llama.cpp wants them."""
    types = _types(config)
    if not isinstance(types, list):
        return {}
    widths = {"mlp": config.get("intermediate_size"), "moe": config.get("moe_intermediate_size")}
    return {
        "layer_types": types,
        "layers_block_type": types,
        "num_hidden_layers": len(types),
        "widths_of_blocks": [widths.get(name, 0) for name in types],
        "state_space_size": config.get("mamba_num_heads", 0) * config.get("mamba_head_dim", 0),
        "latent_width": config.get("moe_latent_size") or 0,
        "latent_experts": [name == "moe" and bool(config.get("moe_latent_size")) for name in types],
    } | key_heads(config, types)


def _from_file(config: Config) -> Config:
    """Returns the values of config.json that follow from what `_hybrid` computes."""
    heads = {"mamba_head_dim": config["state_space_size"] // config["mamba_num_heads"]}
    return heads | {"moe_latent_size": config.get("latent_width") or None}


NEMOTRON_H = replace(
    NEMOTRON,
    family="Nemotron-H, Nemotron Nano 2",
    classes=("NemotronHForCausalLM",),
    model_type="nemotron_h",
    gguf="nemotron_h",
    linears=(
        ("mixer.in_proj",),
        ("mixer.out_proj",),
        ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"),
        ("mixer.o_proj",),
        ("mixer.up_proj",),
        ("mixer.down_proj",),
    ),
    told=lambda config: "moe" not in (_types(config) or ()),
    gguf_block={
        "norm": "attn_norm",
        **mamba2_modules("mixer"),
        "mixer.q_proj": "attn_q",
        "mixer.k_proj": "attn_k",
        "mixer.v_proj": "attn_v",
        "mixer.o_proj": "attn_output",
        "mixer.up_proj": "ffn_up",
        "mixer.down_proj": "ffn_down",
    },
    gguf_tensors=mamba2_tensors("mixer"),
    gguf_top={
        "model.embeddings.weight": "token_embd.weight",
        "model.norm_f.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    },
    only={
        f"mixer.{start}": ("layer_types", (block_type,))
        for block_type, starts in {
            RECURRENT: ("in_proj", "conv1d", "norm", "out_proj", "dt_bias", "A_log", "D"),
            FULL: ("q_proj", "k_proj", "v_proj", "o_proj"),
            "mlp": ("up_proj", "down_proj"),
        }.items()
        for start in starts
    },
    renamed={r"^backbone\.": "model."},
    norm_plus=0,
    decays=("mixer.A_log",),
    columns=("mixer.A_log", "mixer.D"),
    grouped={"mixer.norm.weight": "n_groups"},
    keys=(
        replace(RMS_NORM, config="layer_norm_epsilon"),
        replace(LAYER_NORM, config="layer_norm_epsilon"),  # llama.cpp wants both
        KEY_HEADS_OF_BLOCKS,
        Key("feed_forward_length", "widths_of_blocks", many=True),
        Key("ssm.conv_kernel", "conv_kernel"),
        Key("ssm.state_size", "ssm_state_size"),
        Key("ssm.group_count", "n_groups"),
        Key("ssm.time_step_rank", "mamba_num_heads"),
        Key("ssm.inner_size", "state_space_size"),
    ),
    aliases={"layers_block_type": "layer_types"},
    former={"mamba_n_groups": "n_groups", "mamba_d_conv": "conv_kernel", "mamba_conv_bias": "use_conv_bias"},
    reads=("mamba_head_dim", "moe_intermediate_size"),
    derived=_hybrid,
    restored=_from_file,
    fixed={
        "mlp_hidden_act": ("relu2",),
        "mamba_hidden_act": ("silu",),
        "use_conv_bias": (True,),
        "use_bias": (False,),
        "sliding_window": (None,),
    },
    flags={"attention_bias": "mixer.q_proj", "mlp_bias": "mixer.up_proj"},
    rope_types=("default", "dynamic"),
    partial=False,
    square_heads=False,
    needs_types=(RECURRENT, FULL),
    embedding="model.embeddings.weight",
    final_norm="model.norm_f",
)

FURTHER = {"key_heads_of_blocks": "num_key_value_heads", "widths_of_blocks": "moe_intermediate_size"}
"""Key of config.json with one value for each block -> the key with that of blocks that predict further tokens."""

NEMOTRON_H_MOE = replace(
    NEMOTRON_H,
    family="Nemotron 3 (Nano, Super)",
    gguf="nemotron_h_moe",
    linears=(
        *NEMOTRON_H.linears[:4],
        ("mixer.fc1_latent_proj",),
        ("mixer.experts.*.up_proj",),
        ("mixer.experts.*.down_proj",),
        ("mixer.fc2_latent_proj",),
        ("mixer.shared_experts.up_proj",),
        ("mixer.shared_experts.down_proj",),
    ),
    told=lambda config: True,
    gguf_block={module: gguf for module, gguf in NEMOTRON_H.gguf_block.items() if gguf not in ("ffn_up", "ffn_down")}
    | {
        "mixer.gate": "ffn_gate_inp",
        "mixer.fc1_latent_proj": "ffn_latent_down",
        "mixer.fc2_latent_proj": "ffn_latent_up",
        "mixer.experts.*.up_proj": "ffn_up_exps",
        "mixer.experts.*.down_proj": "ffn_down_exps",
        "mixer.shared_experts.up_proj": "ffn_up_shexp",
        "mixer.shared_experts.down_proj": "ffn_down_shexp",
    },
    gguf_tensors=NEMOTRON_H.gguf_tensors | {"mixer.gate.e_score_correction_bias": "exp_probs_b.bias"},
    only={start: choice for start, choice in NEMOTRON_H.only.items() if choice[1] != ("mlp",)}
    | dict.fromkeys(("mixer.gate", "mixer.experts.", "mixer.shared_experts."), ("layer_types", ("moe",)))
    | dict.fromkeys(("mixer.fc1_latent_proj", "mixer.fc2_latent_proj"), ("latent_experts", (True,))),
    experts="n_routed_experts",
    # A block with attention and one with experts, of which llama.cpp makes one.
    renamed=NEMOTRON_H.renamed
    | {
        r"^mtp\.layers\.1\.norm\.": "mtp.layers.0.post_attention_layernorm.",
        r"^mtp\.layers\.1\.final_layernorm\.": "mtp.layers.0.shared_head.norm.",
        r"^mtp\.layers\.1\.": "mtp.layers.0.",
    },
    further=True,
    predictor=PREDICTOR | {"post_attention_layernorm": "post_attention_norm"},
    predicts_like=(FULL, "moe", True),
    keys=(
        *(replace(key, further=FURTHER.get(key.config)) for key in NEMOTRON_H.keys),
        *ROUTED_KEYS,
        Key("expert_shared_feed_forward_length", "moe_shared_expert_intermediate_size"),
        Key("expert_weights_norm", "norm_topk_prob", bool, True),
        Key("moe_latent_size", "latent_width"),
    ),
    fixed=NEMOTRON_H.fixed | {"n_group": (1,), "mlp_bias": (False,)},
    flags={"attention_bias": "mixer.q_proj"},
)
