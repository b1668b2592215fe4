"""Architectures: MiniMax."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import Config, Key
from lqexport.converters.models.families.deepseek import SIGMOID
from lqexport.converters.models.families.mixtral import MIXTRAL
from lqexport.converters.models.families.parts import ATTENTION, EXPERT_KEYS, EXPERTS, HEAD_NORMS, RMS_NORM


def _rotated_share(config: Config) -> Config:
    """Returns the share of a head's columns that is rotated, where config.json gives their number `rotary_dim`."""
    columns = config.get("rotary_dim")
    if not columns or config.get("partial_rotary_factor") is not None:
        return {}
    return {"partial_rotary_factor": columns / (config.get("head_dim") or columns)}


MINIMAX_M2 = replace(
    MIXTRAL,
    family="MiniMax M2",
    classes=("MiniMaxM2ForCausalLM",),
    model_type="minimax_m2",
    gguf="minimax-m2",
    exl2=None,
    gguf_block={
        "input_layernorm": "attn_norm",
        **ATTENTION,
        **HEAD_NORMS,
        "post_attention_layernorm": "ffn_norm",
        **EXPERTS,
    },
    gguf_tensors={"mlp.e_score_correction_bias": "exp_probs_b.bias"},
    rows={},
    keys=(
        RMS_NORM,
        *EXPERT_KEYS,
        Key("expert_feed_forward_length", "intermediate_size"),
        Key("expert_gating_func", "expert_gating_func", int, SIGMOID),
    ),
    derived=_rotated_share,
    partial=True,
    fixed={"hidden_act": ("silu",), "tie_word_embeddings": (False,)},
    rope_types=("default", "dynamic"),
)
