"""Architectures: Gemma."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import GATED, Config, ExLlamaV2, Key
from lqexport.converters.models.families.parts import (
    ATTENTION,
    BEFORE_AND_AFTER,
    HEAD_NORMS,
    POOLING,
    RMS_NORM,
    expert_stacks,
    rope_of_both_types,
)
from lqexport.converters.models.families.qwen import QWEN2
from lqexport.converters.models.hf_defaults import FULL, SLIDING
from lqexport.converters.models.windows import layer_types

GEMMA = replace(
    QWEN2,
    family="Gemma 1",
    classes=("GemmaForCausalLM",),
    model_type="gemma",
    gguf="gemma",
    exl2=ExLlamaV2(),
    norm_plus=1,
    # transformers takes "gelu", which the first config.json files have, for the approximation by tanh, too.
    fixed={
        "hidden_act": ("gelu_pytorch_tanh", "gelu"),
        "attention_bias": (False,),
        "tie_word_embeddings": (True,),
        "use_bidirectional_attention": (None, False),
    },
    rope_types=("default", "dynamic", "linear", "yarn"),
)

GEMMA2 = replace(
    QWEN2,
    family="Gemma 2",
    classes=("Gemma2ForCausalLM",),
    model_type="gemma2",
    gguf="gemma2",
    exl2=ExLlamaV2(),
    gguf_block={**BEFORE_AND_AFTER, **ATTENTION, **GATED},
    norm_plus=1,
    adds=False,  # norms come between the outputs and the sum
    keys=(
        RMS_NORM,
        Key("attn_logit_softcapping", "attn_logit_softcapping", float, 50.0),
        Key("final_logit_softcapping", "final_logit_softcapping", float, 30.0),
    ),
    fixed={"hidden_activation": ("gelu_pytorch_tanh",), "attention_bias": (False,), "tie_word_embeddings": (True,)},
    rope_types=("default", "dynamic"),
    period=2,
    needs_windows=True,
    wide_scale=46,
)

GEMMA3 = replace(
    GEMMA2,
    family="Gemma 3 (of models with images: the text part)",
    classes=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    model_type="gemma3_text",
    gguf="gemma3",
    # ExLlamaV2 knows only the model with images; it also loads one without image tensors.
    exl2=ExLlamaV2(renamed={"^": "language_model."}, called="Gemma3ForConditionalGeneration"),
    gguf_block={**BEFORE_AND_AFTER, **ATTENTION, **HEAD_NORMS, **GATED},
    renamed={r"^(model\.)?language_model\.(model\.)?": "model.", r"^model\.lm_head\.": "lm_head."},
    unused=(*GEMMA2.unused, r"vision_tower\.", r"multi_modal_projector\."),
    keys=(RMS_NORM,),
    derived=rope_of_both_types,
    fixed={
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "use_bidirectional_attention": (False,),
    },
    rope_types=("default", "dynamic", "linear"),
    period=6,
    needs_windows=False,
    wide_scale=62,
)

EMBEDDING_GEMMA = replace(
    GEMMA3,
    family="EmbeddingGemma (encoder of sentences)",
    classes=("Gemma3TextModel",),
    gguf="gemma-embedding",
    exl2=None,
    encoder=True,
    pools_normed=True,
    gguf_top={
        "embed_tokens.weight": "token_embd.weight",
        "norm.weight": "output_norm.weight",
        "2_Dense.linear.weight": "dense_2.weight",
        "3_Dense.linear.weight": "dense_3.weight",
    },
    projections={
        "2_Dense.linear.weight": ("dense_2_feat_out", "dense_2_feat_in"),
        "3_Dense.linear.weight": ("dense_3_feat_out", "dense_3_feat_in"),
    },
    renamed={r"^model\.": ""},
    keys=(
        RMS_NORM,
        POOLING,
        *(
            Key(f"dense_{place}_feat_{end}", f"dense_{place}_feat_{end}", default=0)
            for place in (2, 3)
            for end in ("in", "out")
        ),
    ),
    # There is no output layer; a tied output is the way to say that none is missing.
    derived=lambda config: rope_of_both_types(config) | {"tie_word_embeddings": True},
    fixed=GEMMA3.fixed | {"use_bidirectional_attention": (True,)},
    needs_windows=True,
    wide_scale=0,
    blocks="layers",
    embedding="embed_tokens.weight",
    final_norm="norm",
)


def _gemma4(config: Config) -> Config:
    """Returns the types and sizes of the blocks, which config.json gives for both types of blocks, or for each block.

    `per_layer_config` is what transformers 5.23 makes of `global_head_dim` and `num_global_key_value_heads`.
    """
    layers, width = config.get("num_hidden_layers", 0), config.get("intermediate_size", 0)
    types = list(config.get("layer_types") or layer_types(6, layers))
    types[-1:] = [FULL]
    by_block = {int(block): values for block, values in (config.get("per_layer_config") or {}).items()}
    full = next(iter(by_block.values()), None) or _given_for_full_blocks(config)
    size = full.get("head_dim") or config.get("head_dim")
    heads = full.get("num_key_value_heads") or config.get("num_key_value_heads")
    equal = all(by_block.get(layer, {}) == (full if types[layer] == FULL else {}) for layer in range(len(types)))
    first, double = layers - config.get("num_kv_shared_layers", 0), 1 + bool(config.get("use_double_wide_mlp"))
    return {
        "layer_types": types,
        "global_head_dim": size,
        "num_global_key_value_heads": heads,
        "window_head_dim": config.get("head_dim"),
        "equal_full_blocks": (equal or not by_block) and full.keys() <= {"head_dim", "num_key_value_heads"},
        "key_value_heads": [heads if each == FULL else config.get("num_key_value_heads") for each in types],
        "feed_forward_lengths": [width * (double if layer >= first else 1) for layer in range(layers)],
        "value_projections": [each == SLIDING or not config.get("attention_k_eq_v") for each in types],
    }


def _given_for_full_blocks(config: Config) -> Config:
    heads = config.get("num_global_key_value_heads") if config.get("attention_k_eq_v") else None
    return {"head_dim": config.get("global_head_dim") or 512, "num_key_value_heads": heads}


def _gemma4_from_gguf(config: Config) -> Config:
    """Returns the keys of config.json of which `_gemma4` makes what a GGUF file says of each block."""
    types, heads, widths = config["layer_types"], config["key_value_heads"], config["feed_forward_lengths"]
    with_own_keys = range(len(types) - config["num_kv_shared_layers"])
    in_windows = [count for count, each in zip(heads * len(types), types, strict=False) if each == SLIDING]
    in_full = [count for count, each in zip(heads * len(types), types, strict=False) if each == FULL]
    return {
        "head_dim": config["window_head_dim"],
        "global_head_dim": config["head_dim"],
        "num_key_value_heads": max(in_windows or heads),
        "num_global_key_value_heads": max(in_full or heads),
        "attention_k_eq_v": not all(config["value_projections"][layer] for layer in with_own_keys),
        "intermediate_size": widths[0],
        "use_double_wide_mlp": widths[-1] != widths[0],
        "final_logit_softcapping": config["final_logit_softcapping"] or None,
        "vocab_size_per_layer_input": config["vocab_size"],
    }


def _gemma4_carried(config: Config) -> int:
    """Returns the most columns of inputs of all blocks, and of the last keys and values that others use."""
    inputs = config["num_hidden_layers"] * (config.get("hidden_size_per_layer_input") or 0)
    if not config.get("num_kv_shared_layers"):
        return int(inputs)
    in_windows = config["num_key_value_heads"] * config["window_head_dim"]
    return int(inputs + 2 * (in_windows + config["num_global_key_value_heads"] * config["global_head_dim"]))


GEMMA4 = replace(
    GEMMA3,
    family="Gemma 4 31B (of models with images: the text part)",
    classes=("Gemma4ForCausalLM",),
    model_type="gemma4_text",
    gguf="gemma4",
    exl2=None,
    when={"enable_moe_block": (False,), "hidden_size_per_layer_input": (0, None)},
    gguf_tensors={"layer_scalar": "layer_output_scale.weight"},
    only={"self_attn.v_proj": ("value_projections", (True,))},
    borrows="num_kv_shared_layers",
    renamed={},
    unused=GEMMA2.unused,
    norm_plus=0,
    keys=(
        RMS_NORM,
        Key("final_logit_softcapping", "final_logit_softcapping", float, 0.0),
        Key("attention.head_count_kv", "key_value_heads", many=True),
        Key("feed_forward_length", "feed_forward_lengths", many=True),
        Key("attention.key_length_swa", "window_head_dim"),
        Key("attention.value_length_swa", "window_head_dim"),
        Key("rope.dimension_count_swa", "window_head_dim"),
        Key("attention.shared_kv_layers", "num_kv_shared_layers", default=0),
        Key("embedding_length_per_layer_input", "hidden_size_per_layer_input", default=0),
    ),
    reads=("attention_k_eq_v", "use_double_wide_mlp", "num_kv_shared_layers", "vocab_size_per_layer_input"),
    derived=_gemma4,
    restored=_gemma4_from_gguf,
    carries=True,
    carried=_gemma4_carried,
    fixed={
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
        "use_bidirectional_attention": (None, "vision"),  # text is read from left to right in both
        "equal_full_blocks": (True,),
    },
    rope_types=("proportional",),
    partial=True,
    period=None,
    any_windows=True,
    wide_scale=None,
)

GEMMA4_E = replace(
    GEMMA4,
    family="Gemma 4 E2B, E4B (of models with images: the text part)",
    when={"enable_moe_block": (False,)},
    linears=(*GEMMA4.linears, ("per_layer_input_gate",), ("per_layer_projection",)),
    gguf_block=GEMMA4.gguf_block
    | {
        "per_layer_input_gate": "inp_gate",
        "per_layer_projection": "proj",
        "post_per_layer_input_norm": "post_norm",
    },
    gguf_top={
        "model.embed_tokens.weight": "token_embd.weight",
        "model.embed_tokens_per_layer.weight": "per_layer_token_embd.weight",
        "model.per_layer_model_projection.weight": "per_layer_model_proj.weight",
        "model.per_layer_projection_norm.weight": "per_layer_proj_norm.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    },
    tables=("model.embed_tokens_per_layer.weight",),
    same={"vocab_size_per_layer_input": "vocab_size"},
)

GEMMA4_MOE = replace(
    GEMMA4,
    family="Gemma 4 26B A4B (of models with images: the text part)",
    when={"enable_moe_block": (True,), "hidden_size_per_layer_input": (0, None)},
    linears=(
        *GEMMA4.linears,
        ("experts.*.gate_proj", "experts.*.up_proj"),
        ("experts.*.down_proj",),
    ),
    gguf_block=GEMMA4.gguf_block
    | {
        "post_feedforward_layernorm_1": "post_ffw_norm_1",
        "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
        "post_feedforward_layernorm_2": "post_ffw_norm_2",
        "router.proj": "ffn_gate_inp",
        "experts.*.gate_proj": "ffn_gate_exps",
        "experts.*.up_proj": "ffn_up_exps",
        "experts.*.down_proj": "ffn_down_exps",
    },
    gguf_tensors=GEMMA4.gguf_tensors
    | {"router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale"},
    stacked=expert_stacks("experts"),
    experts="num_experts",
    aliases={"top_k_experts": "num_experts_per_tok"},
    keys=(
        *GEMMA4.keys,
        Key("expert_count", "num_experts"),
        Key("expert_used_count", "num_experts_per_tok"),
        Key("expert_feed_forward_length", "moe_intermediate_size"),
    ),
)
