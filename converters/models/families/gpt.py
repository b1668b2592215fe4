"""Architectures: GPT-2 and GPT-NeoX."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import Architecture, Key
from lqexport.converters.models.families.parts import LAYER_NORM, four_times

GPT_NEOX = Architecture(
    biased=True,
    family="GPT-NeoX, Pythia",
    classes=("GPTNeoXForCausalLM",),
    model_type="gpt_neox",
    gguf="gptneox",
    linears=(
        ("attention.query_key_value",),
        ("attention.dense",),
        ("mlp.dense_h_to_4h",),
        ("mlp.dense_4h_to_h",),
    ),
    gguf_block={
        "input_layernorm": "attn_norm",
        "attention.query_key_value": "attn_qkv",
        "attention.dense": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
    },
    gguf_top={
        "gpt_neox.embed_in.weight": "token_embd.weight",
        "gpt_neox.final_layer_norm.weight": "output_norm.weight",
        "gpt_neox.final_layer_norm.bias": "output_norm.bias",
        "lm_head.weight": "output.weight",
    },
    rows={"attention.query_key_value": ("qkv", "num_attention_heads")},
    renamed={r"^embed_out\.": "lm_head."},
    unused=(r"rotary_emb\.inv_freq$", r"attention\.(bias|masked_bias)$"),
    keys=(LAYER_NORM, Key("use_parallel_residual", "use_parallel_residual", bool, True)),
    partial=True,
    aliases={"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"},
    fixed={"hidden_act": ("gelu",), "attention_bias": (True,), "tie_word_embeddings": (False,)},
    free_heads=False,
    blocks="gpt_neox.layers",
    embedding="gpt_neox.embed_in.weight",
    final_norm="gpt_neox.final_layer_norm",
    rope_types=("default", "dynamic"),
)

GPT2 = Architecture(
    biased=True,
    family="GPT-2",
    classes=("GPT2LMHeadModel",),
    model_type="gpt2",
    gguf="gpt2",
    linears=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    gguf_block={
        "ln_1": "attn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    },
    gguf_top={
        "transformer.wte.weight": "token_embd.weight",
        "transformer.wpe.weight": "position_embd.weight",
        "transformer.ln_f.weight": "output_norm.weight",
        "transformer.ln_f.bias": "output_norm.bias",
        "lm_head.weight": "output.weight",
    },
    transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    renamed={r"^(h\.|wte\.|wpe\.|ln_f\.)": r"transformer.\1"},
    unused=(r"attn\.(bias|masked_bias)$",),
    keys=(replace(LAYER_NORM, config="layer_norm_epsilon"),),
    aliases={
        "n_layer": "num_hidden_layers",
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "n_inner": "intermediate_size",
    },
    derived=four_times,
    fixed={
        "activation_function": ("gelu_new",),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
    },
    rope_types=(),
    free_heads=False,
    blocks="transformer.h",
    embedding="transformer.wte.weight",
    final_norm="transformer.ln_f",
)
