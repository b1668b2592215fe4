"""Architectures: DeepSeek V4."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lqexport.converters.models.architecture import TOKEN_DIGITS, Config, Key
from lqexport.converters.models.families.deepseek import BESIDE_EXPERTS, ROUTED_KEYS, SHARED
from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.parts import EXPERT_LINEARS, EXPERTS, RMS_NORM
from lqexport.converters.models.hf_defaults import SLIDING
from lqexport.errors import UserError

SPARSE, HEAVY = "compressed_sparse_attention", "heavily_compressed_attention"
"""The types of blocks that attend to compressed keys, too: to some that an indexer chooses, or to all."""
RATES = {SPARSE: 4, HEAVY: 128}
"""How many tokens one compressed key stands for, in llama.cpp and by default."""
RATE_KEYS = {SPARSE: "compress_rate_csa", HEAVY: "compress_rate_hca"}
"""Type of a block -> an older key of config.json with the number of tokens of a compressed key."""
TYPES = {0: SLIDING, 4: SPARSE, 128: HEAVY}
"""Number of tokens of a compressed key, as `compress_ratios` has it -> type of the block."""
HASH, SCORED = "hash_moe", "moe"
"""The types of MLPs: experts are chosen by the number of the token, or by their scores."""
HASHED = 3
"""The default number of the first blocks whose experts are chosen by the number of the token."""
ROTATED = 64 / 512
"""The default share of a head's columns that are rotated."""
SQRT_SOFTPLUS = 4
"""The function that turns the score of an expert into its weight, by llama.cpp's number."""

COMPRESSOR, INDEXER = "self_attn.compressor", "self_attn.compressor.indexer"


def _types(config: Config) -> list[str]:
    """Returns `layer_types`, which may follow from `compress_ratios`, or have transformers' default."""
    layers, given, ratios = config.get("num_hidden_layers", 0), config.get("layer_types"), config.get("compress_ratios")
    if given is not None:
        return list(given)
    if ratios is None:
        return [HEAVY] * min(layers, 2) + [SPARSE if layer % 2 else HEAVY for layer in range(max(layers - 2, 0))]
    if strange := [ratio for ratio in ratios if ratio not in TYPES]:
        raise UserError(f"config.json: compress_ratios must be 0, 4 or 128 for each block, not {strange[0]!r}.")
    return [TYPES[ratio] for ratio in ratios[:layers]]


def _experts(config: Config) -> Config:
    """Returns the types of the blocks' MLPs. `num_hash_layers` is None where others come before those with `HASH`."""
    layers, types = config.get("num_hidden_layers", 0), config.get("mlp_layer_types")
    count = config.get("num_hash_layers")
    hashed = types.count(HASH) if types is not None else min(layers, HASHED if count is None else count)
    pattern = [HASH] * hashed + [SCORED] * (layers - hashed)
    fits = types in (None, pattern)
    return {"mlp_layer_types": pattern if fits else types, "num_hash_layers": hashed if fits else None}


def _rotated(config: Config) -> float:
    """Returns the share of a head's columns that are rotated, where the rotary settings do not give it."""
    if config.get("partial_rotary_factor") is not None:
        return float(config["partial_rotary_factor"])
    columns = config.get("qk_rope_head_dim")
    return columns / config["head_dim"] if columns else ROTATED


def _rope(config: Config) -> Config:
    """Returns the rotary settings under the usual names of their keys, where transformers writes two objects of them.

    One is for blocks that compress keys, and has the scaling and a base of its own. The other is for the other blocks.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    plain, compressed = given.get("main"), given.get("compress")
    if isinstance(plain, dict) and isinstance(compressed, dict):
        top = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if config.get(key) is not None}
        plain, compressed = ({"partial_rotary_factor": 1.0} | top | each for each in (plain, compressed))
        share = compressed["partial_rotary_factor"]
        if plain.get("rope_type", "default") != "default" or plain["partial_rotary_factor"] != share:
            return {}  # refused for GGUF
        settings = {"rope_theta": plain.get("rope_theta"), "compress_rope_theta": compressed.get("rope_theta")}
    else:
        compressed, settings, share = given, {}, _rotated(config)
    apart = ("main", "compress", "type", "rope_theta", "partial_rotary_factor")
    scaling = {key: value for key, value in compressed.items() if key not in apart}
    scaling.setdefault("rope_type", compressed.get("type", "default"))
    if scaling.get("attention_factor") == 1:  # the default
        del scaling["attention_factor"]
    settings |= {"partial_rotary_factor": share, "rope_parameters": scaling}
    return settings | ({"rope_scaling": None} if "rope_scaling" in config else {})


def _deepseek4(config: Config) -> Config:
    """Returns the types of blocks, the rotary settings, and what transformers computes whatever config.json says.

    Raises UserError if `compress_ratios` has a number that transformers does not know, or if `swiglu_limit` is not
    above 0.
    """
    types, limit = _types(config), config.get("swiglu_limit")
    if not isinstance(limit, int | float) or limit <= 0:
        raise UserError(f"config.json: swiglu_limit must be above 0, not {limit!r}.")
    rates = dict(config.get("compress_rates") or RATES)
    rates |= {name: config[key] for name, key in RATE_KEYS.items() if config.get(key) is not None}
    return _experts(config) | _rope(config) | {
        "layer_types": types,
        "compress_rates": rates,
        "compress_ratios": [RATES.get(each, 0) for each in types],
        "swiglu_limits": [float(limit)] * len(types),
        "num_key_value_heads": 1,
        "intermediate_size": config.get("moe_intermediate_size"),
        "norm_topk_prob": True,
    }  # fmt: skip


def _from_gguf(config: Config) -> Config:
    """Returns the keys of config.json for which GGUF has others. Raises UserError if blocks have different limits."""
    rope, limits = dict(config["rope_parameters"]), set(config["swiglu_limits"])
    if len(limits) != 1:
        raise UserError(f"The limits of the experts are {sorted(limits)}, and config.json has one for all blocks.")
    share = rope.pop("partial_rotary_factor", 1.0)
    return {
        "rope_theta": rope.pop("rope_theta"),
        "partial_rotary_factor": share,
        "rope_parameters": rope,
        "layer_types": [SLIDING if each is None else each for each in config["layer_types"]],
        "swiglu_limit": limits.pop(),
    }


def _refused(config: Config) -> str | None:
    """Returns why llama.cpp does not compute a model as transformers does.

    Its process ends if the heads of the indexer have the size of other heads, or one that is no multiple of 64.
    """
    name, columns = "DeepseekV4ForCausalLM", config["index_head_dim"]
    if columns % 64 or columns == config["head_dim"]:
        return (
            f"llama.cpp computes {name} with heads of the indexer whose size is a multiple of 64 and another than that "
            f"of other heads, and config.json has index_head_dim {columns} and head_dim {config['head_dim']}."
        )
    if "main" in config["rope_parameters"]:
        return (
            f"llama.cpp computes {name} with the same columns rotated in all blocks, and with rope scaling only in "
            f"those that compress keys, and config.json has {config['rope_parameters']}."
        )
    return None


NAMES: dict[str, str] = {
    r"^(?:model\.)?layers\.": "model.layers.",
    r"^embed\.": "model.embed_tokens.",
    r"^norm\.": "model.norm.",
    r"^head\.": "lm_head.",
    r"^hc_head_": "model.hc_head.hc_",
    r"\.hc_(attn|ffn)_(fn|base|scale)$": r".\1_hc.\2",
    r"\.attn_norm\.": ".input_layernorm.",
    r"\.ffn_norm\.": ".post_attention_layernorm.",
    r"\.attn\.": ".self_attn.",
    r"\.ffn\.": ".mlp.",
    r"\.attn_sink$": ".sinks",
    r"\.indexer\.compressor\.": ".compressor.indexer.",
    r"\.self_attn\.indexer\.": ".self_attn.compressor.indexer.",
    r"\.indexer\.weights_proj\.": ".indexer.scorer.weights_proj.",
    r"\.w(q_a|q_b|kv|o_a|o_b)\.": r".\1_proj.",
    r"\.wgate\.": ".gate_proj.",
    r"\.q_norm\.": ".q_a_norm.",
    # Of the keys of a token, too, where transformers has written the checkpoint.
    r"\.(self_attn|compressor|indexer)\.norm\.": r".\1.kv_norm.",
    r"\.ape$": ".position_bias",
    r"\.gate\.bias$": ".gate.e_score_correction_bias",
    r"\.(shared_experts|experts\.\d+)\.w1\.": r".\1.gate_proj.",
    r"\.(shared_experts|experts\.\d+)\.w2\.": r".\1.down_proj.",
    r"\.(shared_experts|experts\.\d+)\.w3\.": r".\1.up_proj.",
}
"""DeepSeek's names of tensors -> transformers'."""

HYPER = {f"{part}_hc.{end}": f"hc_{part}_{end}.weight" for part in ("attn", "ffn") for end in ("fn", "base", "scale")}
HYPER_HEAD = {f"model.hc_head.hc_{end}": f"output_hc_{end}.weight" for end in ("fn", "base", "scale")}
"""The tensors that mix the hidden states of a token, before and behind each part of a block, and after the last."""

OF_TYPES: dict[str, tuple[str, tuple[Any, ...]]] = {
    COMPRESSOR: ("layer_types", (HEAVY, SPARSE)),
    INDEXER: ("layer_types", (SPARSE,)),
    "mlp.gate.tid2eid": ("mlp_layer_types", (HASH,)),
    "mlp.gate.e_score_correction_bias": ("mlp_layer_types", (SCORED,)),
}

DEEPSEEK_V4 = replace(
    LLAMA,
    family="DeepSeek V4",
    classes=("DeepseekV4ForCausalLM",),
    model_type="deepseek_v4",
    gguf="deepseek4",
    exl2=None,
    linears=(
        (
            "self_attn.q_a_proj",
            "self_attn.kv_proj",
            f"{COMPRESSOR}.kv_proj",
            f"{COMPRESSOR}.gate_proj",
            f"{INDEXER}.kv_proj",
            f"{INDEXER}.gate_proj",
            f"{INDEXER}.scorer.weights_proj",
        ),
        ("self_attn.q_b_proj", f"{INDEXER}.q_b_proj"),
        ("self_attn.o_b_proj",),
        *BESIDE_EXPERTS[2:],
        *EXPERT_LINEARS,
    ),
    # The indexer comes before the compressor: the first module that a file holds tells the type of a block.
    gguf_block={
        "input_layernorm": "attn_norm",
        "self_attn.q_a_proj": "attn_q_a",
        "self_attn.q_a_norm": "attn_q_a_norm",
        "self_attn.q_b_proj": "attn_q_b",
        "self_attn.kv_proj": "attn_kv",
        "self_attn.kv_norm": "attn_kv_a_norm",
        f"{INDEXER}.kv_proj": "indexer_compressor_kv",
        f"{INDEXER}.gate_proj": "indexer_compressor_gate",
        f"{INDEXER}.kv_norm": "indexer_compressor_norm",
        f"{INDEXER}.q_b_proj": "indexer.attn_q_b",
        f"{INDEXER}.scorer.weights_proj": "indexer.proj",
        f"{COMPRESSOR}.kv_proj": "attn_compressor_kv",
        f"{COMPRESSOR}.gate_proj": "attn_compressor_gate",
        f"{COMPRESSOR}.kv_norm": "attn_compressor_norm",
        "self_attn.o_a_proj": "attn_output_a",
        "self_attn.o_b_proj": "attn_output_b",
        "post_attention_layernorm": "ffn_norm",
        **SHARED,
        **EXPERTS,
    },
    gguf_tensors={
        "self_attn.sinks": "attn_sinks.weight",
        f"{COMPRESSOR}.position_bias": "attn_compressor_ape.weight",
        f"{INDEXER}.position_bias": "indexer_compressor_ape.weight",
        "mlp.gate.tid2eid": "ffn_gate_tid2eid.weight",
        "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
        **HYPER,
    },
    gguf_top={**LLAMA.gguf_top, **HYPER_HEAD},
    experts="n_routed_experts",
    only=OF_TYPES,
    rows={},
    streams="hc_mult",
    merging="model.hc_head",
    token_ids=True,
    carried=lambda config: (config["hc_mult"] - 1) * config["hidden_size"] + TOKEN_DIGITS,
    rounded=("self_attn.o_a_proj",),
    renamed=NAMES,
    whole=("mlp.gate.tid2eid",),
    further=True,
    keys=(
        RMS_NORM,
        Key("attention.q_lora_rank", "q_lora_rank"),
        Key("attention.output_lora_rank", "o_lora_rank"),
        Key("attention.output_group_count", "o_groups"),
        Key("attention.compress_ratios", "compress_ratios", many=True),
        Key("attention.compress_rope_freq_base", "compress_rope_theta", float),
        Key("attention.sliding_window", "sliding_window"),
        Key("attention.indexer.head_count", "index_n_heads"),
        Key("attention.indexer.key_length", "index_head_dim"),
        Key("attention.indexer.top_k", "index_topk"),
        Key("hyper_connection.count", "hc_mult"),
        Key("hyper_connection.sinkhorn_iterations", "hc_sinkhorn_iters"),
        Key("hyper_connection.epsilon", "hc_eps", float),
        *ROUTED_KEYS,
        Key("expert_weights_norm", "norm_topk_prob", bool, True),
        Key("expert_gating_func", "expert_gating_func", int, SQRT_SOFTPLUS),
        Key("hash_layer_count", "num_hash_layers"),
        Key("swiglu_clamp_exp", "swiglu_limits", float, many=True),
    ),
    reads=("rope_theta", "swiglu_limit"),
    derived=_deepseek4,
    restored=_from_gguf,
    fixed={
        "hidden_act": ("silu",),
        "mlp_bias": (False,),
        "scoring_func": ("sqrtsoftplus",),
        "n_shared_experts": (1,),
        "hc_mult": (4,),
        "tie_word_embeddings": (False,),
        "compress_rates": (RATES,),
    },
    refuses=_refused,
    same={},
    flags={},
    rope_types=("default", "yarn"),
    partial=True,
    all_windows=True,
    needs_types=(SPARSE,),
    adds=False,
)
