"""The table of shapes: by which sizes of the metadata the shape of each tensor is bound, whatever the file says of it.

llama.cpp refuses a file in which one of them is otherwise. The names of sizes are those of `block_sizes.py`.
"""

from __future__ import annotations

from lqexport.checking.opened import OpenFile

Table = dict[str, tuple[tuple[str, ...], ...]]
"""Name of a tensor (within its block) without `.weight` -> the shapes that it may have, rows first."""

NORMS = (
    "attn_norm", "attn_norm_2", "attn_post_norm", "attn_output_norm", "post_attention_norm", "ffn_norm",
    "ffn_post_norm", "post_ffw_norm", "post_ffw_norm_1", "pre_ffw_norm_2", "post_ffw_norm_2", "layer_output_norm",
    "post_norm", "output_norm", "token_embd_norm", "altup_router_norm", "altup_correct_scale", "laurel_post_norm",
    "nextn.enorm", "nextn.hnorm", "nextn.shared_head_norm",
)  # fmt: skip
"""The tensors with a number for each column of the hidden states."""
OUTSIDE: Table = {
    "token_embd": (("vocabulary", "hidden"),),
    "output": (("vocabulary", "hidden"),),
    "position_embd": (("context", "hidden"),),
    "token_types": (("token types", "hidden"),),
    "rope_freqs": (("half rotated",),),
    "rope_factors_long": (("half rotated",),),
    "rope_factors_short": (("half rotated",),),
    "per_layer_token_embd": (("any", "all layer widths"),),
    "per_layer_model_proj": (("all layer widths", "hidden"),),
    "per_layer_proj_norm": (("layer width",),),
    "altup_proj": (("further inputs", "hidden", "hidden"),),
    "altup_unembd_proj": (("further inputs", "hidden", "hidden"),),
    "dense_2": (("out_2", "in_2"),),
    "dense_3": (("out_3", "in_3"),),
    "output_hc_fn": (("streams", "all streams"),),
    "output_hc_base": (("streams",),),
}
EMBEDDED: Table = {
    "inp_gate": (("layer width", "hidden"),),
    "proj": (("hidden", "layer width"),),
    "altup_router": (("inputs", "hidden"),),
    "altup_correct_coef": (("inputs", "inputs"),),
    "altup_predict_coef": (("inputs squared", "inputs"),),
    "nextn.eh_proj": (("hidden", "twice hidden"),),
    "nextn.embed_tokens": (("vocabulary", "hidden"),),
    "nextn.shared_head_head": (("vocabulary", "hidden"),),
}
"""The tensors of blocks that predict further tokens, or get an embedding of their own or several hidden states."""
ATTENTION: Table = {
    "attn_q": (("queries and gates", "hidden"),),
    "attn_k": (("keys", "hidden"),),
    "attn_v": (("values", "hidden"),),
    "attn_qkv": (("all heads", "hidden"),),
    "attn_gate": (("queries", "hidden"),),
    "attn_output": (("hidden", "attended"),),
    "attn_q_norm": (("width",), ("queries",), ("heads", "width")),
    "attn_k_norm": (("width",), ("keys",), ("any", "width")),
    "attn_sinks": (("heads",),),
}
LATENT: Table = {
    "attn_q": (("whole queries", "hidden"),),
    "attn_q_a": (("query rank", "hidden"),),
    "attn_q_a_norm": (("query rank",),),
    "attn_q_b": (("whole queries", "query rank"),),
    "attn_kv_a_mqa": (("rank and rotated", "hidden"),),
    "attn_kv_a_norm": (("rank",),),
    "attn_kv_b": (("keys and values", "rank"),),
    "attn_k_b": (("heads", "rank", "unrotated"),),
    "attn_v_b": (("heads", "whole values", "rank"),),
    "attn_output": (("hidden", "whole attended"),),
}
"""Attention by latent vectors (`Architecture.latent`)."""
INDEXER: Table = {
    "indexer.attn_q_b": (("index queries", "query rank"),),
    "indexer.attn_k": (("index width", "hidden"),),
    "indexer.k_norm": (("index width",),),
    "indexer.proj": (("index heads", "hidden"),),
}
COMPRESSED: Table = {
    "attn_q_a": (("query rank", "hidden"),),
    "attn_q_a_norm": (("query rank",),),
    "attn_q_b": (("queries", "query rank"),),
    "attn_kv": (("keys", "hidden"),),
    "attn_kv_a_norm": (("width",),),
    "attn_output_a": (("outputs", "group"),),
    "attn_output_b": (("hidden", "outputs"),),
    "attn_compressor_kv": (("width", "hidden"), ("twice width", "hidden")),
    "attn_compressor_gate": (("width", "hidden"), ("twice width", "hidden")),
    "attn_compressor_norm": (("width",),),
    "attn_compressor_ape": (("ratio", "width"), ("ratio", "twice width")),
    "indexer_compressor_kv": (("twice index width", "hidden"),),
    "indexer_compressor_gate": (("twice index width", "hidden"),),
    "indexer_compressor_norm": (("index width",),),
    "indexer_compressor_ape": (("ratio", "twice index width"),),
    "hc_attn_fn": (("mixing", "all streams"),),
    "hc_attn_base": (("mixing",),),
    "hc_ffn_fn": (("mixing", "all streams"),),
    "hc_ffn_base": (("mixing",),),
}
"""DeepSeek V4's attention to compressed keys, and its streams of hidden states."""
FEED_FORWARD: Table = {
    "ffn_gate": (("mlp", "hidden"),),
    "ffn_up": (("mlp", "hidden"),),
    "ffn_down": (("hidden", "mlp"),),
    "ffn_gate_inp": (("experts", "hidden"),),
    "ffn_gate_tid2eid": (("vocabulary", "used experts"),),
    "exp_probs_b": (("experts",),),
    "ffn_gate_exps": (("experts", "expert", "expert inputs"),),
    "ffn_up_exps": (("experts", "expert", "expert inputs"),),
    "ffn_down_exps": (("experts", "expert inputs", "expert"),),
    "ffn_latent_down": (("expert inputs", "hidden"),),
    "ffn_latent_up": (("hidden", "expert inputs"),),
    "ffn_gate_shexp": (("shared", "hidden"),),
    "ffn_up_shexp": (("shared", "hidden"),),
    "ffn_down_shexp": (("hidden", "shared"),),
    "ffn_gate_inp_shexp": (("hidden",),),
}
STATE_SPACE: Table = {
    "ssm_in": (("twice inner", "hidden"),),
    "ssm_conv1d": (("inner", "kernel"),),
    "ssm_x": (("steps and states", "inner"),),
    "ssm_dt": (("inner", "steps"),),
    "ssm_a": (("inner", "state"),),
    "ssm_d": (("inner",),),
    "ssm_out": (("hidden", "inner"),),
    "ssm_dt_norm": (("steps",),),
    "ssm_b_norm": (("state",),),
    "ssm_c_norm": (("state",),),
}
"""Mamba, and Jamba's blocks."""
STATE_SPACE_2: Table = {
    "ssm_in": (("inner and mixed", "hidden"),),
    "ssm_conv1d": (("mixed", "kernel"),),
    "ssm_norm": (("groups", "inner of a group"),),
    "ssm_dt": (("steps",),),
    "ssm_a": (("steps", "one"),),
    "ssm_d": (("steps", "one"),),
    "ssm_out": (("hidden", "inner"),),
}
"""Mamba 2, and the blocks of Granite 4, Falcon-H1 and Nemotron-H."""
DELTA: Table = {
    "attn_qkv": (("all heads", "hidden"), ("mixed", "hidden")),
    "attn_gate": (("inner", "hidden"),),
    "ssm_conv1d": (("mixed", "kernel"),),
    "ssm_norm": (("inner of a step",),),
    "ssm_ba": (("twice steps", "hidden"),),
    "ssm_beta": (("steps", "hidden"),),
    "ssm_alpha": (("steps", "hidden"),),
    "ssm_dt": (("steps",),),
    "ssm_a": (("steps",),),
    "ssm_out": (("hidden", "inner"),),
}
"""The gated delta rule of Qwen3-Next and Qwen3.5."""
KIMI: Table = {
    "attn_q": (("whole queries", "hidden"), ("recurrent", "hidden")),
    "attn_k": (("recurrent", "hidden"),),
    "attn_v": (("recurrent", "hidden"),),
    "attn_output": (("hidden", "whole attended"), ("hidden", "recurrent")),
    **{f"ssm_conv1d_{name}": (("recurrent", "one", "kernel"),) for name in "qkv"},
    "ssm_f_a": (("recurrent width", "hidden"),),
    "ssm_f_b": (("recurrent", "recurrent width"),),
    "ssm_g_a": (("recurrent width", "hidden"),),
    "ssm_g_b": (("recurrent", "recurrent width"),),
    "ssm_beta": (("heads", "hidden"),),
    "ssm_norm": (("recurrent width",),),
    "ssm_a": (("heads", "one"),),
    "ssm_dt": (("recurrent",),),
}
"""Kimi Linear's recurrent blocks."""
SHORT_CONVOLUTION: Table = {
    "shortconv.in_proj": (("three hidden", "hidden"),),
    "shortconv.conv": (("hidden", "cache"),),
    "shortconv.out_proj": (("hidden", "hidden"),),
}
WITHOUT_GATE: Table = {"ffn_up": (("mlp", "hidden"), ("gate and up", "hidden"))}
"""MLPs whose gate is none, or the first half of the rows of another matrix."""


def shape_table(file: OpenFile) -> Table:
    """Returns the part of the table that holds for a file's architecture."""
    table = OUTSIDE | dict.fromkeys(NORMS, (("hidden",),)) | FEED_FORWARD | EMBEDDED | SHORT_CONVOLUTION
    if not any(name.endswith("ffn_gate.weight") for name in file.tensors):
        table |= WITHOUT_GATE
    if file.entries:  # in another architecture the same names may stand for other linears
        table |= _attention(file) | INDEXER
    return table | _states(file)


def _attention(file: OpenFile) -> Table:
    if any(entry.latent for entry in file.entries):
        return LATENT
    return ATTENTION | COMPRESSED if file.get("attention.output_lora_rank") is not None else ATTENTION


def _states(file: OpenFile) -> Table:
    """Returns the shapes in blocks without attention, by the keys that such an architecture has."""
    if file.get("kda.head_dim") is not None:
        return KIMI
    if file.get("ssm.inner_size") is None or not file.entries:
        return {}
    if file.get("ssm.group_count") is None:
        return STATE_SPACE
    return DELTA if any(entry.gated for entry in file.entries) else STATE_SPACE_2
