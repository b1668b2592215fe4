"""Names and keys that many families share."""

from __future__ import annotations

from lqexport.converters.models.architecture import MEAN, Config, Key, Stack
from lqexport.converters.models.hf_defaults import FULL, SLIDING
from lqexport.converters.models.rope import head_dim, rope_settings

RMS_NORM = Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", float, 1e-6)

POOLING = Key("pooling_type", "pooling_type", int, MEAN)
"""The key of an encoder by which its hidden states become one vector."""

LAYER_NORM = Key("attention.layer_norm_epsilon", "layer_norm_eps", float, 1e-5)

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}

HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}

EXPERTS = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.*.gate_proj": "ffn_gate_exps",
    "mlp.experts.*.up_proj": "ffn_up_exps",
    "mlp.experts.*.down_proj": "ffn_down_exps",
}

EXPERT_LINEARS = (("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"), ("mlp.experts.*.down_proj",))

ALL_EXPERTS_LINEARS = (QKV, ("self_attn.o_proj",), *EXPERT_LINEARS)
ALL_EXPERTS_BLOCK = {
    "input_layernorm": "attn_norm",
    **ATTENTION,
    **HEAD_NORMS,
    "post_attention_layernorm": "ffn_norm",
    **EXPERTS,
}
"""A block whose MLP is experts alone, with norms of the heads of queries and keys."""

UNGATED_LINEARS = (QKV, ("self_attn.o_proj",), ("mlp.up_proj",), ("mlp.down_proj",))
UNGATED_BLOCK = {
    "input_layernorm": "attn_norm",
    **ATTENTION,
    "post_attention_layernorm": "ffn_norm",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""A block whose MLP has no gate."""

EXPERT_KEYS = (Key("expert_count", "num_local_experts"), Key("expert_used_count", "num_experts_per_tok"))

EXPERTS_BY_NUMBER = {
    r"(experts\.\d+)\.w1\.": r"\1.gate_proj.",
    r"(experts\.\d+)\.w3\.": r"\1.up_proj.",
    r"(experts\.\d+)\.w2\.": r"\1.down_proj.",
}
"""Regular expression -> replacement; together they turn Mixtral's names of an expert's linears into the usual ones."""

BEFORE_AND_AFTER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}

INTERLEAVED = {
    "self_attn.q_proj": ("rope", "num_attention_heads"),
    "self_attn.k_proj": ("rope", "num_key_value_heads"),
}


def rope_of_both_types(config: Config) -> Config:
    """Returns the rotary settings of blocks with and without a window, where config.json is older than transformers 5.

    Rope scaling is for the blocks that attend to the whole context.
    """
    if config.get("rope_parameters"):
        return {}
    scaling = dict(config.get("rope_scaling") or {})
    rope_type = scaling.pop("type", "default")
    full = {"rope_type": rope_type, "rope_theta": config.get("rope_theta"), **scaling}
    local = {"rope_type": "default", "rope_theta": config.get("rope_local_base_freq")}
    return {"rope_parameters": {FULL: full, SLIDING: local}, "rope_scaling": None}


def rope_of_alpha(config: Config) -> Config:
    """Returns the rotary settings where `alpha` changes the base, as in Hunyuan's models; else {}.

    The base is theta * alpha ^ (n / (n - 2)) for heads of n columns (`compute_ntk_alpha_rope_parameters` of
    transformers), whatever the length of the text.
    """
    settings = rope_settings(config)
    if settings["rope_type"] != "dynamic" or not settings.get("alpha"):
        return {}
    columns = head_dim(config)
    theta = settings["rope_theta"] * settings["alpha"] ** (columns / (columns - 2))
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}, "rope_scaling": None}


def four_times(config: Config) -> Config:
    """Returns the width of the MLP, 4 x hidden_size, where config.json does not give it."""
    return {} if config.get("intermediate_size") else {"intermediate_size": 4 * config.get("hidden_size", 0)}


def expert_stacks(module: str, *, transposed: bool = False) -> dict[str, Stack]:
    """Returns `stacked` of an entry for a module of experts, such as `mlp.experts`, as transformers 5 writes it."""
    gate, up, down = (f"{module}.*.{linear}_proj.weight" for linear in ("gate", "up", "down"))
    return {
        f"{module}.gate_up_proj": Stack((gate, up), transposed=transposed),
        f"{module}.down_proj": Stack((down,), transposed=transposed),
    }


def dense_first(leading: int, layers: int) -> list[str]:
    """Returns `mlp_layer_types` of config.json where the first `leading` blocks have no experts."""
    return ["dense"] * leading + ["sparse"] * (layers - leading)


def mlp_types(config: Config) -> Config:
    """Returns the types of the blocks' MLPs, and the number of leading blocks without experts.

    `first_k_dense_replace` is None where blocks without experts follow blocks with experts.
    """
    layers, leading = config.get("num_hidden_layers", 0), config.get("first_k_dense_replace", 1)
    if (types := config.get("mlp_layer_types")) is not None:
        leading = types.count("dense")
    pattern = dense_first(leading, layers)
    fits = types in (None, pattern)
    return {"mlp_layer_types": pattern if fits else types, "first_k_dense_replace": leading if fits else None}
