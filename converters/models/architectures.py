"""The table of architectures. One entry makes a family of models known to the pipeline, the planner and the converters.

`tests/test_families.py` runs a small model of every entry in llama.cpp and compares it with transformers.
`tools/models_table.py` makes the table of `docs/models.md` from these entries.
"""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import GATED, MEAN, Architecture, Config, ExLlamaV2, Key
from lqexport.errors import UserError

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


def _four_times(config: Config) -> Config:
    """Returns the width of the MLP, 4 x hidden_size, where config.json does not give it."""
    return {} if config.get("intermediate_size") else {"intermediate_size": 4 * config.get("hidden_size", 0)}


GEMMA3_SIZES = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
"""transformers' defaults for the sizes that a config.json leaves out, as those of Gemma 3 models with images do."""


def _gemma3_rope(config: Config) -> Config:
    """Returns the rotary settings of both types of blocks, where config.json is older than transformers 5."""
    if config.get("rope_parameters"):
        return {}
    full = {"rope_type": "default", **(config.get("rope_scaling") or {}), "rope_theta": config.get("rope_theta", 1e6)}
    local = {"rope_type": "default", "rope_theta": config.get("rope_local_base_freq", 1e4)}
    return {"rope_parameters": {"full_attention": full, "sliding_attention": local}, "rope_scaling": None}


LLAMA = Architecture(
    family="Llama 1 to 3.3, SmolLM2, Mistral",
    classes=("LlamaForCausalLM", "MistralForCausalLM"),
    model_type="llama",
    gguf="llama",
    exl2=ExLlamaV2(),
    linears=(QKV, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)),
    gguf_block={"input_layernorm": "attn_norm", **ATTENTION, "post_attention_layernorm": "ffn_norm", **GATED},
    gguf_top={
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    },
    rows=INTERLEAVED,
    keys=(RMS_NORM,),
    fixed={"hidden_act": ("silu",)},
    flags={"attention_bias": "self_attn.q_proj", "mlp_bias": "mlp.gate_proj"},
    rope_types=("default", "dynamic", "linear", "yarn", "llama3"),
)

QWEN2 = replace(
    LLAMA,
    family="Qwen2, Qwen2.5",
    classes=("Qwen2ForCausalLM",),
    model_type="qwen2",
    gguf="qwen2",
    exl2=ExLlamaV2(biased=QKV),
    defaults={"use_sliding_window": False},
    rows={},
    flags={},
    rope_types=("default", "dynamic", "yarn"),
)

QWEN3 = replace(
    QWEN2,
    family="Qwen3",
    classes=("Qwen3ForCausalLM",),
    model_type="qwen3",
    gguf="qwen3",
    exl2=None,  # ExLlamaV2's norms of heads subtract the mean
    gguf_block={
        "input_layernorm": "attn_norm",
        **ATTENTION,
        **HEAD_NORMS,
        "post_attention_layernorm": "ffn_norm",
        **GATED,
    },
    defaults=QWEN2.defaults | {"head_dim": 128},
    fixed={"hidden_act": ("silu",), "attention_bias": (False,)},
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
    defaults={"tie_word_embeddings": True, "head_dim": 256},
    fixed={"hidden_activation": ("gelu_pytorch_tanh",), "attention_bias": (False,), "tie_word_embeddings": (True,)},
    rope_types=("default", "dynamic"),
    period=2,
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
    renamed={r"^(model\.)?language_model\.(model\.)?": "model."},
    unused=(*GEMMA2.unused, r"vision_tower\.", r"multi_modal_projector\."),
    keys=(RMS_NORM,),
    defaults=GEMMA2.defaults | GEMMA3_SIZES,
    derived=_gemma3_rope,
    fixed=GEMMA2.fixed
    | {"attn_logit_softcapping": (None,), "final_logit_softcapping": (None,), "use_bidirectional_attention": (False,)},
    rope_types=("default", "dynamic", "linear"),
    period=6,
    wide_scale=62,
)

PHI3 = replace(
    QWEN2,
    family="Phi-3, Phi-3.5, Phi-4",
    classes=("Phi3ForCausalLM",),
    model_type="phi3",
    gguf="phi3",
    exl2=ExLlamaV2(
        split={"self_attn.qkv_proj": QKV, "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")},
    ),
    linears=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    gguf_block={
        "input_layernorm": "attn_norm",
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    rope_types=("default", "longrope"),
    defaults={},
)

MIXTRAL = replace(
    LLAMA,
    family="Mixtral",
    classes=("MixtralForCausalLM",),
    model_type="mixtral",
    exl2=ExLlamaV2(
        renamed={
            r"\.mlp\.": ".block_sparse_moe.",
            r"\.gate_proj\.": ".w1.",
            r"\.up_proj\.": ".w3.",
            r"\.down_proj\.": ".w2.",
        }
    ),
    linears=(QKV, ("self_attn.o_proj",), *EXPERT_LINEARS),
    gguf_block={"input_layernorm": "attn_norm", **ATTENTION, "post_attention_layernorm": "ffn_norm", **EXPERTS},
    experts="num_local_experts",
    renamed={
        r"\.block_sparse_moe\.": ".mlp.",
        r"(experts\.\d+)\.w1\.": r"\1.gate_proj.",
        r"(experts\.\d+)\.w3\.": r"\1.up_proj.",
        r"(experts\.\d+)\.w2\.": r"\1.down_proj.",
    },
    keys=(replace(RMS_NORM, default=1e-5), *EXPERT_KEYS),
    flags={},
)

QWEN3_MOE = replace(
    QWEN3,
    family="Qwen3 MoE",
    classes=("Qwen3MoeForCausalLM",),
    model_type="qwen3_moe",
    gguf="qwen3moe",
    linears=(QKV, ("self_attn.o_proj",), *EXPERT_LINEARS),
    gguf_block={
        "input_layernorm": "attn_norm",
        **ATTENTION,
        **HEAD_NORMS,
        "post_attention_layernorm": "ffn_norm",
        **EXPERTS,
    },
    experts="num_local_experts",
    keys=(RMS_NORM, *EXPERT_KEYS, Key("expert_feed_forward_length", "moe_intermediate_size")),
    aliases={"num_experts": "num_local_experts"},
    defaults=QWEN2.defaults | {"norm_topk_prob": False},
    fixed=QWEN3.fixed | {"norm_topk_prob": (True,), "decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
)

LATENT = {
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "self_attn.o_proj": "attn_output",
}
LATENT_QUERY = {
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
}
SHARED = {
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
BESIDE_EXPERTS = (
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
    ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    ("mlp.shared_experts.down_proj",),
)
DEEPSEEK_KEYS = (
    RMS_NORM,
    Key("leading_dense_block_count", "first_k_dense_replace"),
    Key("attention.q_lora_rank", "q_lora_rank"),
    Key("attention.kv_lora_rank", "kv_lora_rank"),
    Key("expert_count", "n_routed_experts"),
    Key("expert_used_count", "num_experts_per_tok"),
    Key("expert_shared_count", "n_shared_experts"),
    Key("expert_feed_forward_length", "moe_intermediate_size"),
    Key("expert_weights_scale", "routed_scaling_factor", float, 1.0),
)
SOFTMAX, SIGMOID = 1, 2
"""The function that turns the score of an expert into its weight.

The numbers are llama.cpp's. A config.json that is rebuilt from GGUF has them as `expert_gating_func`."""


def _latent(config: Config) -> Config:
    """Returns the number of key heads, and the groups of experts where they have no effect.

    Each query head has its own key head, whatever number config.json gives. Where experts of all groups may be chosen,
    groups change nothing, and llama.cpp wants none.
    """
    groups, chosen = config.get("n_group") or 1, config.get("topk_group") or 1
    none = {"n_group": 1, "topk_group": 1} if chosen >= groups else {}
    return {"num_key_value_heads": config.get("num_attention_heads")} | none


DEEPSEEK_V3 = replace(
    LLAMA,
    family="DeepSeek V3, R1",
    classes=("DeepseekV3ForCausalLM",),
    model_type="deepseek_v3",
    gguf="deepseek2",
    exl2=None,
    linears=(
        ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
        ("self_attn.q_b_proj",),
        ("self_attn.kv_b_proj",),
        ("self_attn.o_proj",),
        *BESIDE_EXPERTS,
        *EXPERT_LINEARS,
    ),
    gguf_block={
        "input_layernorm": "attn_norm",
        **LATENT_QUERY,
        **LATENT,
        "post_attention_layernorm": "ffn_norm",
        **GATED,
        "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
        **SHARED,
        **EXPERTS,
    },
    experts="n_routed_experts",
    dense="first_k_dense_replace",
    rows={},
    unused=(*LLAMA.unused, r"^model\.layers\.61\."),  # the extra block that predicts the token after the next one
    keys=(
        *DEEPSEEK_KEYS,
        Key("expert_group_count", "n_group", int, 1),
        Key("expert_group_used_count", "topk_group", int, 1),
        Key("expert_weights_norm", "norm_topk_prob", bool, True),
        Key("expert_gating_func", "expert_gating_func", int, SIGMOID),
    ),
    derived=_latent,
    fixed={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "rope_interleave": (True,),
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "moe_layer_freq": (1,),
    },
    flags={},
    latent=True,
    rope_types=("default", "dynamic", "yarn"),
)


def _with_plain_queries(entry: Architecture, family: str) -> Architecture:
    """Returns the entry for a family's smaller models, in which only keys and values are latent."""
    modules = {name: gguf for name, gguf in entry.gguf_block.items() if name not in LATENT_QUERY}
    (_, _, *others), keys = entry.linears, tuple(key for key in entry.keys if key.config != "q_lora_rank")
    return replace(
        entry,
        family=family,
        when={"q_lora_rank": (None,)},
        linears=(("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa"), *others),
        gguf_block={"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q"} | modules,
        keys=keys,
        fixed=entry.fixed | {"num_hidden_layers": (27, 26)},
    )


DEEPSEEK_V2 = replace(
    DEEPSEEK_V3,
    family="DeepSeek V2",
    classes=("DeepseekV2ForCausalLM",),
    model_type="deepseek_v2",
    gguf_block={name: gguf for name, gguf in DEEPSEEK_V3.gguf_block.items() if gguf != "exp_probs_b.bias"},
    keys=(
        *DEEPSEEK_KEYS,
        Key("expert_weights_norm", "norm_topk_prob", bool, False),
        Key("expert_gating_func", "expert_gating_func", int, SOFTMAX),
    ),
    fixed=DEEPSEEK_V3.fixed
    | {"mlp_bias": (False,), "norm_topk_prob": (False,), "scoring_func": ("softmax",), "topk_method": ("greedy",)},
)

DEEPSEEK_V3_LITE = _with_plain_queries(DEEPSEEK_V3, "DeepSeek V3 with plain queries")
DEEPSEEK_V2_LITE = _with_plain_queries(DEEPSEEK_V2, "DeepSeek V2 Lite, Coder V2 Lite")

OLMO2 = replace(
    QWEN2,
    family="OLMo 2",
    classes=("Olmo2ForCausalLM",),
    model_type="olmo2",
    gguf="olmo2",
    exl2=None,
    gguf_block={
        **ATTENTION,
        **HEAD_NORMS,
        "post_attention_layernorm": "post_attention_norm",
        **GATED,
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    adds=False,
    keys=(replace(RMS_NORM, default=1e-5),),
    fixed={"hidden_act": ("silu",), "attention_bias": (False,)},
    rope_types=("default", "dynamic"),
    defaults={},
)

SMOLLM3 = replace(
    LLAMA,
    family="SmolLM3",
    classes=("SmolLM3ForCausalLM",),
    model_type="smollm3",
    gguf="smollm3",
    exl2=None,
    defaults={"tie_word_embeddings": True, "use_sliding_window": False},
    fixed={"hidden_act": ("silu",), "no_rope_layer_interval": (4,)},
    rope_types=("default", "dynamic", "yarn"),
)

GRANITE = replace(
    LLAMA,
    family="Granite 3",
    classes=("GraniteForCausalLM",),
    model_type="granite",
    gguf="granite",
    # ExLlamaV2 multiplies scales by residual_multiplier and rounds them again, to numbers that the solver did not see.
    exl2=None,
    adds=False,  # the outputs are multiplied by residual_multiplier first
    keys=(
        RMS_NORM,
        Key("attention.scale", "attention_multiplier", float, 1.0),
        Key("embedding_scale", "embedding_multiplier", float, 1.0),
        Key("residual_scale", "residual_multiplier", float, 1.0),
        Key("logit_scale", "logits_scaling", float, 1.0),
    ),
    rope_types=("default", "dynamic"),
)

STARCODER2 = replace(
    QWEN2,
    family="StarCoder2",
    classes=("Starcoder2ForCausalLM",),
    model_type="starcoder2",
    gguf="starcoder2",
    exl2=ExLlamaV2(
        biased=(*QKV, "self_attn.o_proj", "mlp.c_fc", "mlp.c_proj"), keys={"layer_norm_epsilon": "norm_epsilon"}
    ),
    linears=(QKV, ("self_attn.o_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    gguf_block={
        "input_layernorm": "attn_norm",
        **ATTENTION,
        "post_attention_layernorm": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    },
    gguf_top=LLAMA.gguf_top | {"model.norm.bias": "output_norm.bias"},
    keys=(replace(LAYER_NORM, config="norm_epsilon"),),
    defaults={"tie_word_embeddings": True},
    fixed={"hidden_act": ("gelu_pytorch_tanh",), "use_bias": (True,)},
    rope_types=("default", "dynamic"),
)

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
    defaults={"max_position_embeddings": 2048, "tie_word_embeddings": True},
    derived=_four_times,
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
    derived=lambda config: _four_times(config) | {"num_key_value_heads": 1},
    fixed=FALCON.fixed | {"multi_query": (True,)},
)

GPT_NEOX = Architecture(
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
    aliases={"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"},
    fixed={"hidden_act": ("gelu",), "attention_bias": (True,)},
    free_heads=False,
    blocks="gpt_neox.layers",
    embedding="gpt_neox.embed_in.weight",
    final_norm="gpt_neox.final_layer_norm",
    rope_types=("default", "dynamic"),
)

GPT2 = Architecture(
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
    defaults={"tie_word_embeddings": True},
    derived=_four_times,
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

OPT = Architecture(
    family="OPT",
    classes=("OPTForCausalLM",),
    model_type="opt",
    gguf=None,
    adds=False,  # in the model of 350 million weights, norms come after the sums
    linears=(QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",)),
    # llama.cpp does not run OPT. The GGUF names only give the modules' roles and the order of the tensors.
    gguf_block={
        "self_attn_layer_norm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.out_proj": "attn_output",
        "final_layer_norm": "ffn_norm",
        "fc1": "ffn_up",
        "fc2": "ffn_down",
    },
    gguf_top={
        "model.decoder.embed_tokens.weight": "token_embd.weight",
        "model.decoder.embed_positions.weight": "position_embd.weight",
        "model.decoder.final_layer_norm.weight": "output_norm.weight",
        "model.decoder.final_layer_norm.bias": "output_norm.bias",
        "lm_head.weight": "output.weight",
    },
    renamed={r"^decoder\.": "model.decoder."},
    aliases={"ffn_dim": "intermediate_size"},
    defaults={"tie_word_embeddings": True},
    rope_types=(),
    free_heads=False,
    blocks="model.decoder.layers",
    embedding="model.decoder.embed_tokens.weight",
    final_norm="model.decoder.final_layer_norm",
)

BERT = Architecture(
    family="BERT (encoders of sentences)",
    classes=("BertModel",),
    model_type="bert",
    gguf="bert",
    encoder=True,
    adds=False,
    linears=(
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        ("attention.output.dense",),
        ("intermediate.dense",),
        ("output.dense",),
    ),
    # A norm follows the linear after which it is listed: it is applied to the linear's output plus the residual.
    gguf_block={
        "attention.self.query": "attn_q",
        "attention.self.key": "attn_k",
        "attention.self.value": "attn_v",
        "attention.output.dense": "attn_output",
        "attention.output.LayerNorm": "attn_output_norm",
        "intermediate.dense": "ffn_up",
        "output.dense": "ffn_down",
        "output.LayerNorm": "layer_output_norm",
    },
    gguf_top={
        "embeddings.word_embeddings.weight": "token_embd.weight",
        "embeddings.position_embeddings.weight": "position_embd.weight",
        "embeddings.token_type_embeddings.weight": "token_types.weight",
        "embeddings.LayerNorm.weight": "token_embd_norm.weight",
        "embeddings.LayerNorm.bias": "token_embd_norm.bias",
        "pooler.dense.weight": "cls.weight",
        "pooler.dense.bias": "cls.bias",
    },
    unused=(r"position_ids$",),
    keys=(
        replace(LAYER_NORM, default=1e-12),
        Key("attention.causal", "is_decoder", bool, False),
        Key("pooling_type", "pooling_type", int, MEAN),
    ),
    defaults={"max_position_embeddings": 512, "type_vocab_size": 2},
    fixed={"hidden_act": ("gelu",), "is_decoder": (False,), "position_embedding_type": ("absolute",)},
    # There is no output layer; a tied output is the way to say that none is missing.
    derived=lambda config: {"tie_word_embeddings": True},
    rope_types=(),
    free_heads=False,
    blocks="encoder.layer",
    embedding="embeddings.word_embeddings.weight",
    # The only module after the last block. The text's embedding does not go through it.
    final_norm="pooler.dense",
)

ARCHITECTURES = (
    LLAMA,
    QWEN2,
    QWEN3,
    GEMMA2,
    GEMMA3,
    PHI3,
    MIXTRAL,
    QWEN3_MOE,
    DEEPSEEK_V3_LITE,
    DEEPSEEK_V3,
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V2,
    OLMO2,
    SMOLLM3,
    GRANITE,
    STARCODER2,
    FALCON,
    FALCON_7B,
    GPT_NEOX,
    GPT2,
    OPT,
    BERT,
)


def find_architecture(config: Config) -> Architecture | None:
    """Returns the entry for a config.json, with `*` still in the names of experts.

    Returns None where config.json names an architecture that the table does not have.
    """
    names = config.get("architectures") or []
    named = [entry for entry in ARCHITECTURES if any(name in entry.classes for name in names)]
    return next((entry for entry in named if all(config.get(key) in said for key, said in entry.when.items())), None)


def architecture_of(config: Config) -> Architecture:
    """Returns the entry for a config.json, expanded to its number of experts.

    Raises UserError if it names an architecture that is not in the table, or if the architecture has experts and
    config.json does not give their number.
    """
    if (architecture := find_architecture(config)) is None:
        names = ", ".join(map(str, config.get("architectures") or ())) or "(config.json names none)"
        known = ", ".join(name for entry in ARCHITECTURES for name in entry.classes)
        raise UserError(f"Unknown architecture {names}. Known: {known}.")
    if architecture.experts is None:
        return architecture
    count, leading = (normalized(config).get(key or "", 0) for key in (architecture.experts, architecture.dense))
    if not isinstance(count, int) or not 1 <= count <= 4096:
        raise UserError(f"config.json gives no {architecture.experts}.")
    if not isinstance(leading, int) or leading < 0:
        raise UserError(f"config.json gives no {architecture.dense}.")
    return architecture.expanded(count, leading)


def normalized(config: Config) -> Config:
    """Returns config.json under the usual names of its keys, with the architecture's defaults filled in.

    For a model with images, this is the config of its text part.
    """
    if (architecture := find_architecture(config)) is None:
        return config
    if "text_config" in config:
        config = config["text_config"] | {"architectures": [architecture.classes[0]]}
    aliases = architecture.aliases.items()
    usual = {name: config[alias] for alias, name in aliases if config.get(alias) is not None and name not in config}
    complete = architecture.defaults | usual | config
    return complete | architecture.derived(complete)
