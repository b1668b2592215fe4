"""Architectures: Gemma 3n."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import Config, Key
from lqexport.converters.models.families.gemma import GEMMA3, GEMMA4_E
from lqexport.converters.models.families.parts import RMS_NORM, rope_of_both_types
from lqexport.converters.models.hf_defaults import FULL, SLIDING
from lqexport.converters.models.windows import layer_types

PERIOD = 5
"""Every 5th block attends to the whole context."""
OWN_KEYS, SPARSE, SPARSITY = 20, 10, 0.95
"""What llama.cpp has no keys for: how many of the first blocks have keys of their own, how many have sparse
activations, and how sparse these are."""


def _gemma3n(config: Config) -> Config:
    """Returns transformers' defaults of lists, and what llama.cpp derives from the number of blocks.

    The table of the blocks' inputs gets as many rows as the embedding (`extended`).
    """
    layers = config.get("num_hidden_layers") or 0
    types = config.get("layer_types") or layer_types(PERIOD, layers)
    sparsity = [SPARSITY if layer < SPARSE < layers else 0.0 for layer in range(layers)]
    return rope_of_both_types(config) | {
        "layer_types": types,
        "activation_sparsity_pattern": config.get("activation_sparsity_pattern") or sparsity,
        "usual_sparsity": [SPARSITY if layer < SPARSE else 0.0 for layer in range(layers)],
        "usual_shared_layers": max(layers - OWN_KEYS, 0),
        "last_types": types[OWN_KEYS - 2 : OWN_KEYS] if layers > OWN_KEYS else None,
        "vocab_size_per_layer_input": config.get("vocab_size"),
    }


def _from_gguf(config: Config) -> Config:
    usual = _gemma3n(config)
    return {
        "activation_sparsity_pattern": usual["usual_sparsity"],
        "vocab_size_per_layer_input": usual["vocab_size_per_layer_input"],
    }


def _carried(config: Config) -> int:
    """Returns the columns of three further hidden states, of inputs of all blocks, and of keys and values."""
    inputs = config["num_hidden_layers"] * (config.get("hidden_size_per_layer_input") or 0)
    keys = config["num_key_value_heads"] * config["head_dim"] if config.get("num_kv_shared_layers") else 0
    return int(3 * config["hidden_size"] + inputs + 4 * keys)


GEMMA3N = replace(
    GEMMA3,
    family="Gemma 3n E2B, E4B (of models with images: the text part)",
    classes=("Gemma3nForCausalLM", "Gemma3nForConditionalGeneration"),
    model_type="gemma3n_text",
    gguf="gemma3n",
    exl2=None,
    linears=GEMMA4_E.linears,
    gguf_block=GEMMA3.gguf_block
    | {
        "altup.correction_coefs": "altup_correct_coef",
        "altup.prediction_coefs": "altup_predict_coef",
        "altup.modality_router": "altup_router",
        "altup.router_norm": "altup_router_norm",
        "laurel.linear_left": "laurel_l",
        "laurel.linear_right": "laurel_r",
        "laurel.post_laurel_norm": "laurel_post_norm",
        "per_layer_input_gate": "inp_gate",
        "per_layer_projection": "proj",
        "post_per_layer_input_norm": "post_norm",
    },
    gguf_tensors={"altup.correct_output_scale": "altup_correct_scale.weight"},
    gguf_top={
        **GEMMA4_E.gguf_top,
        **{f"model.altup_projections.{number}.weight": "altup_proj.weight" for number in range(3)},
        **{f"model.altup_unembed_projections.{number}.weight": "altup_unembd_proj.weight" for number in range(3)},
    },
    tables=GEMMA4_E.tables,
    extended=GEMMA4_E.tables,
    borrows="num_kv_shared_layers",
    fills=True,
    streams="altup_num_inputs",
    merging="model.altup_unembed_projections",
    carries=True,
    carried=_carried,
    norm_plus=0,
    keys=(
        RMS_NORM,
        Key("altup.active_idx", "altup_active_idx", default=0),
        Key("altup.num_inputs", "altup_num_inputs", default=4),
        Key("embedding_length_per_layer_input", "hidden_size_per_layer_input", default=256),
        Key("attention.shared_kv_layers", "num_kv_shared_layers", default=0),
    ),
    derived=_gemma3n,
    restored=_from_gguf,
    fixed={
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
        "final_logit_softcapping": (30.0,),
        "altup_active_idx": (0,),
        "altup_num_inputs": (4,),
        "altup_correct_scale": (True,),
        "laurel_rank": (64,),
        "hidden_size_per_layer_input": (256,),
        "last_types": (None, [SLIDING, FULL]),
    },
    same={"num_kv_shared_layers": "usual_shared_layers", "activation_sparsity_pattern": "usual_sparsity"},
    rope_types=("default", "dynamic", "linear"),
    period=PERIOD,
    needs_windows=True,
    wide_scale=None,
)
