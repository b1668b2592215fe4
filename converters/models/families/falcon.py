"""Architectures: Falcon."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.families.parts import LAYER_NORM, four_times

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
