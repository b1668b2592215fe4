"""Names and keys that many families share."""

from __future__ import annotations

from lqexport.converters.models.architecture import Config, Key

RMS_NORM = Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", float, 1e-6)

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

EXPERT_KEYS = (Key("expert_count", "num_local_experts"), Key("expert_used_count", "num_experts_per_tok"))

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


def four_times(config: Config) -> Config:
    """Returns the width of the MLP, 4 x hidden_size, where config.json does not give it."""
    return {} if config.get("intermediate_size") else {"intermediate_size": 4 * config.get("hidden_size", 0)}
