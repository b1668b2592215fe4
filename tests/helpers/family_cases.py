"""Small random models and tokenizers, at least one for each architecture of the table."""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lqexport.converters.gguf import writer as gguf
from lqexport.converters.gguf.pretokenizers import splitter_named
from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.architectures import find_architecture
from lqexport.models.modules import expected_shapes
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.storage.artifact import Artifact

SPECIAL = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
NARROW = SPECIAL | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ONE_KEY_A_QUERY = NARROW | {"intermediate_size": 96, "max_position_embeddings": 512}
SIZES = ONE_KEY_A_QUERY | {"num_key_value_heads": 2}
GPT2_SIZES = SPECIAL | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4}
LONGROPE |= {"short_factor": [1 + i / 8 for i in range(8)], "long_factor": [1.5 + i for i in range(8)]}
YARN = {"rope_type": "yarn", "factor": 16.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
WIDE_HEADS = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
WINDOWS = {
    "rope_parameters": GEMMA3_ROPE,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "num_hidden_layers": 3,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
LATENT = {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 24}
DEEPSEEK_ROPE = YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}
DEEPSEEK = ONE_KEY_A_QUERY | LATENT | {"num_hidden_layers": 3, "rope_parameters": DEEPSEEK_ROPE}
DEEPSEEK |= {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
DEEPSEEK_V3 = DEEPSEEK | {"n_group": 4, "topk_group": 2, "n_shared_experts": 1}
WHOLE_MSCALE = {"mscale": 1.0, "mscale_all_dim": 1.0}
DEEPSEEK_V2 = DEEPSEEK | {"n_shared_experts": 2, "routed_scaling_factor": 1.5}
# llama.cpp recognizes these models by their number of blocks. In each block with experts, rounding errors may send a
# token to other experts, so only the last block has experts.
PLAIN_QUERIES = {"q_lora_rank": None, "num_hidden_layers": 26, "first_k_dense_replace": 25}
PLAIN_QUERIES |= {"n_routed_experts": 4, "num_experts_per_tok": 2}
UNSMOOTHED = ("mixtral", "qwen3moe", "deepseek-v2", "deepseek-v2-lite", "deepseek-v3", "deepseek-v3-lite")
UNSMOOTHED += ("olmo2", "falcon", "falcon-7b")
UNSMOOTHED += ("cohere", "cohere2", "exaone4", "phi2")
"""Cases that are not smoothed: models with experts, or without a norm whose output enters linears only."""
BECOME_OTHERS = ("granite4-attention",)
"""Cases whose artifacts and files have another config.json, and weights with which it computes the same."""
PLUS_ONE = ("gemma", "gemma2", "gemma3", "nemotron")
"""Cases whose norms multiply by 1 + weight."""
SCALES = {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 1.5}

QWEN2_MOE = EXPERTS | {"norm_topk_prob": False, "shared_expert_intermediate_size": 96, "rope_parameters": YARN}
GLM4_MOE = SIZES | {"head_dim": 32, "num_hidden_layers": 3, "n_routed_experts": 4, "num_experts_per_tok": 2}
GLM4_MOE |= {"moe_intermediate_size": 32, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5}
GLM4_LITE = ONE_KEY_A_QUERY | LATENT | {"num_hidden_layers": 3, "q_lora_rank": 32, "n_routed_experts": 4}
GLM4_LITE |= {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
INDEXER = {"q_lora_rank": 32, "index_n_heads": 2, "index_head_dim": 64, "index_topk": 512}
DEEPSEEK_V4 = NARROW | INDEXER | {"num_hidden_layers": 3, "head_dim": 32, "partial_rotary_factor": 0.5}
DEEPSEEK_V4 |= {"max_position_embeddings": 512, "sliding_window": 16, "o_groups": 2, "o_lora_rank": 32}
DEEPSEEK_V4 |= {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 1.0}
DEEPSEEK_V4 |= {"rope_parameters": dict(YARN), "index_head_dim": 128, "num_hash_layers": 2}
DEEPSEEK_V4 |= {"layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]}
SHARED_CHOICE = {"indexer_types": ["full", "shared", "full"], "first_k_dense_replace": 2}
MINIMAX = SIZES | {"head_dim": 32, "rotary_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
ERNIE_MOE = SIZES | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "num_hidden_layers": 3}
LLAMA4 = SIZES | {"head_dim": 16, "num_hidden_layers": 4, "intermediate_size": 32, "intermediate_size_mlp": 96}
LLAMA4 |= {"interleave_moe_layer_step": 2, "num_local_experts": 4, "rope_parameters": LLAMA3}
GPT_OSS = SIZES | {"head_dim": 32, "sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
# llama.cpp rounds the borders of yarn's ramp, and with this base they are whole numbers but for 0.0001.
GPT_OSS |= {"rope_parameters": YARN | {"rope_theta": 5897.1, "truncate": False}}
HUNYUAN = SIZES | {"head_dim": 32, "num_experts": 4, "moe_topk": 2, "tie_word_embeddings": True}
HUNYUAN |= {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "factor": 1.0}}
EXPERT_CASES = ("qwen2moe", "olmoe", "glm4moe", "glm4moe-air", "glm4moe-lite", "minimax-m2", "ernie4_5-moe")
EXPERT_CASES += ("ernie4_5-moe-unshared", "hunyuan-moe", "granitemoe", "gpt-oss", "llama4")
UNSMOOTHED += EXPERT_CASES

COHERE_WINDOWS = {"head_dim": 16, "sliding_window": 16, "num_hidden_layers": 3, "logit_scale": 0.5}
NO_WINDOWS = {"sliding_window": None, "layer_types": ["full_attention"] * 2, "tie_word_embeddings": True}
COHERE_WINDOWS |= {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}

MINISTRAL_ROPE = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5}
MISTRAL4 = ONE_KEY_A_QUERY | LATENT | {"q_lora_rank": 32, "n_routed_experts": 4}
MISTRAL4 |= {"rope_parameters": MINISTRAL_ROPE | {"llama_4_scaling_beta": 0.1}}
MISTRAL4 |= {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_hidden_layers": 2, "first_k_dense_replace": 1}
EXPERT_CASES += ("mistral4",)
UNSMOOTHED += ("mistral4", "deepseek-v32", "deepseek-v4", "glm-dsa")
GLM_ROPE = YARN | {"partial_rotary_factor": 0.5}
ALPHA = {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "factor": 1.0}
OLMO3_ROPE = {"rope_type": "default", "rope_theta": 1e4}
OLMO3_WINDOWS = WINDOWS | {"sliding_window": 16}
OLMO3_YARN = YARN | {"attention_factor": 1 + 0.1 * math.log(16)}
OLMO3_WINDOWS |= {"rope_parameters": {"full_attention": OLMO3_YARN, "sliding_attention": OLMO3_ROPE}}
UNSMOOTHED += ("olmo3",)

LFM2 = SIZES | {"num_hidden_layers": 3, "full_attn_idxs": [1, 2], "conv_L_cache": 4, "intermediate_size": 144}
LFM2 |= {"block_multiple_of": 32, "num_key_value_heads": 1, "tie_word_embeddings": False, "rope_parameters": YARN}
LFM2_MOE = SIZES | {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "full_attention"]}
LFM2_MOE |= {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, "num_dense_layers": 1}
LFM2_MOE |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
EXPERT_CASES += ("lfm2moe",)
UNSMOOTHED += ("lfm2", "lfm2moe")
QWEN3_VL_MOE = SIZES | EXPERTS | {"head_dim": 32, "num_hidden_layers": 4, "text_part_of": "qwen3_vl_moe"}
QWEN3_VL_MOE |= {"mrope_section": [6, 5, 5]}
QWEN3_VL_MOE |= {"moe_intermediate_size": 48}
EXPERT_CASES += ("qwen3vlmoe",)
UNSMOOTHED += ("qwen3vlmoe",)
DELTA_NET = {"head_dim": 32, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
DELTA_NET |= {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 2}
DELTA_NET |= {"linear_num_value_heads": 6, "shared_expert_intermediate_size": 96}
QWEN3_5 = SIZES | DELTA_NET | {"mrope_section": [3, 3, 2]}
QWEN3_5 |= {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}}
UNSMOOTHED += ("qwen3next", "qwen3_5", "qwen3_5moe")
PLUS_ONE += ("qwen3next", "qwen3_5", "qwen3_5moe")
QWEN3_NEXT = SIZES | EXPERTS | DELTA_NET | {"linear_num_value_heads": 4, "rope_parameters": QWEN3_5["rope_parameters"]}

GEMMA3N = SIZES | {"head_dim": 16, "vocab_size_per_layer_input": 512, "intermediate_size": 768, "sliding_window": 16}
GEMMA3N |= {"num_hidden_layers": 2, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.95] * 2}
GEMMA3N |= {"layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 0}
UNSMOOTHED += ("gemma3n",)

GEMMA4 = {"head_dim": 16, "global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
GEMMA4 |= {"pad_token_id": 0, "sliding_window": 16, "num_hidden_layers": 3, "hidden_size_per_layer_input": 0}
GEMMA4 |= {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
GEMMA4_EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
GEMMA4_EXPERTS |= {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA4_INPUTS = {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 512, "num_hidden_layers": 4}
GEMMA4_INPUTS |= {"num_kv_shared_layers": 2, "use_double_wide_mlp": True, "attention_k_eq_v": False}
GEMMA4_INPUTS |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
UNSMOOTHED += ("gemma4", "gemma4-moe", "gemma4-e")

GRANITE4 = SIZES | SCALES | {"num_hidden_layers": 3, "shared_intermediate_size": 96, "num_local_experts": 0}
GRANITE4 |= {"layer_types": ["linear_attention", "linear_attention", "full_attention"], "mamba_n_groups": 2}
GRANITE4 |= {"mamba_n_heads": 8, "mamba_d_state": 16, "mamba_chunk_size": 32, "tie_word_embeddings": True}
GRANITE4_MOE = GRANITE4 | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
GRANITE4_MOE |= {"position_embedding_type": "rope", "mamba_n_groups": 1}
EXPERT_CASES += ("granite4moe",)
GRANITE4_ATTENTION = SIZES | SCALES | {"layer_types": ["full_attention"] * 2, "num_local_experts": 0}
GRANITE4_ATTENTION |= {"shared_intermediate_size": 160, "position_embedding_type": "rope"}
UNSMOOTHED += ("granite4", "granite4moe")

NEMOTRON_H = SIZES | {"head_dim": 32, "num_hidden_layers": 3, "mamba_num_heads": 8, "mamba_head_dim": 16}
NEMOTRON_H |= {"layers_block_type": ["linear_attention", "mlp", "full_attention"], "n_groups": 2, "ssm_state_size": 16}
NEMOTRON_H |= {"chunk_size": 32}
NEMOTRON_H_MOE = NEMOTRON_H | {"layers_block_type": ["linear_attention", "moe", "full_attention"]}
NEMOTRON_H_MOE |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
NEMOTRON_H_MOE |= {"moe_shared_expert_intermediate_size": 96, "routed_scaling_factor": 1.5, "n_groups": 4}
EXPERT_CASES += ("nemotron-h-moe", "nemotron-h-latent")
UNSMOOTHED += ("nemotron-h", "nemotron-h-moe", "nemotron-h-latent")

KIMI_LINEAR = ONE_KEY_A_QUERY | LATENT | {"num_hidden_layers": 3, "linear_head_dim": 32, "linear_num_heads": 4}
KIMI_LINEAR |= {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_experts": 4}
KIMI_LINEAR |= {"num_experts_per_token": 2, "moe_intermediate_size": 32, "routed_scaling_factor": 1.5}
EXPERT_CASES += ("kimi-linear",)
UNSMOOTHED += ("kimi-linear",)

FALCON_H1 = SIZES | {"head_dim": 32, "mamba_d_ssm": 96, "mamba_n_heads": 6, "mamba_n_groups": 2, "mamba_d_state": 16}
FALCON_H1 |= {"mamba_chunk_size": 32, "embedding_multiplier": 2.0, "lm_head_multiplier": 0.5, "key_multiplier": 0.8}
FALCON_H1 |= {"mlp_multipliers": [0.7, 1.2], "attention_in_multiplier": 1.1, "attention_out_multiplier": 0.6}
FALCON_H1 |= {"ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7], "ssm_in_multiplier": 1.3, "ssm_out_multiplier": 0.9}
FALCON_H1_NORM = FALCON_H1 | {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "ssm_out_multiplier": 0.2}
UNSMOOTHED += ("falcon-h1", "falcon-h1-norm")
BECOME_OTHERS += ("falcon-h1", "falcon-h1-norm")

MAMBA2 = SPECIAL | {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "n_groups": 2}
MAMBA2 |= {"state_size": 16, "chunk_size": 32}
MAMBA = SPECIAL | {"hidden_size": 64, "num_hidden_layers": 2, "time_step_rank": 32}
JAMBA = SIZES | {"attn_layer_period": 2, "attn_layer_offset": 0, "mamba_dt_rank": 32}
EXPERT_CASES += ("jamba-moe",)
UNSMOOTHED += ("mamba2", "mamba", "falcon-mamba", "jamba", "jamba-moe")

MIMO2 = SIZES | {"head_dim": 32, "v_head_dim": 16, "num_key_value_heads": 1, "sliding_window": 16}
MIMO2 |= {"num_hidden_layers": 3, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
MIMO2 |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MIMO2 |= {"mlp_layer_types": ["dense", "dense", "sparse"]}
DOTS1 = SIZES | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32}
DOTS1 |= {"num_key_value_heads": 4, "first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.5}
EXAONE_MOE = SIZES | EXPERTS | {"head_dim": 32, "num_hidden_layers": 4, "first_k_dense_replace": 3}
EXAONE_MOE |= {"sliding_window": 16, "sliding_window_pattern": 2}
AFMOE = SIZES | EXPERTS | {"head_dim": 32, "num_hidden_layers": 4, "num_dense_layers": 3, "sliding_window": 16}
AFMOE |= {"mup_enabled": True, "route_scale": 1.5, "num_shared_experts": 1}
del AFMOE["norm_topk_prob"]
HALF = {"rope_type": "default", "partial_rotary_factor": 0.5}
MIMO2_ROPE = {"full_attention": HALF | {"rope_theta": 1e6}, "sliding_attention": HALF | {"rope_theta": 1e4}}
EXPERT_CASES += ("mimo2", "dots1", "exaone-moe", "afmoe")
UNSMOOTHED += ("mimo2", "dots1", "exaone-moe", "afmoe")

CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", SIZES | {"rope_parameters": LLAMA3}, "llama-bpe"),
    "mistral": ("MistralConfig", SIZES | {"head_dim": 32}, "pieces"),
    "qwen2": ("Qwen2Config", SIZES | {"rope_parameters": YARN}, "qwen2"),
    "qwen3": ("Qwen3Config", SIZES | {"head_dim": 32, "tie_word_embeddings": True, "rope_parameters": YARN}, "qwen2"),
    "qwen2vl": ("Qwen2Config", SIZES | {"text_part_of": "qwen2_vl", "mrope_section": [2, 3, 3]}, "qwen2"),
    "qwen3vl": (
        "Qwen3Config",
        SIZES | {"head_dim": 32, "num_hidden_layers": 4, "text_part_of": "qwen3_vl", "mrope_section": [6, 5, 5]},
        "qwen2",
    ),
    "gemma2": ("Gemma2Config", SIZES | WIDE_HEADS, "pieces without prefix"),
    "gemma3": ("Gemma3TextConfig", SIZES | WIDE_HEADS | WINDOWS, "pieces without prefix"),
    "gemma3n": ("Gemma3nTextConfig", GEMMA3N, "pieces without prefix"),
    "gemma4": ("Gemma4TextConfig", SIZES | GEMMA4 | {"final_logit_softcapping": 5.0}, "pieces without prefix"),
    "gemma4-e": ("Gemma4TextConfig", SIZES | GEMMA4 | GEMMA4_INPUTS, "pieces without prefix"),
    "gemma4-moe": ("Gemma4TextConfig", SIZES | GEMMA4 | GEMMA4_EXPERTS, "pieces without prefix"),
    "phi3": ("Phi3Config", SIZES | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}, "pieces"),
    "phi3-short": (
        "Phi3Config",
        SIZES | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 256},
        "pieces",
    ),
    "phi4": ("Phi3Config", SIZES | {"partial_rotary_factor": 0.5}, "smaug-bpe"),
    "mixtral": ("MixtralConfig", SIZES | {"num_local_experts": 4}, "pieces"),
    "qwen3moe": ("Qwen3MoeConfig", SIZES | EXPERTS | {"head_dim": 32, "rope_parameters": YARN}, "qwen2"),
    "deepseek-v3": ("DeepseekV3Config", DEEPSEEK_V3 | {"q_lora_rank": 32}, "deepseek-v3"),
    "deepseek-v3-lite": ("DeepseekV3Config", DEEPSEEK_V3 | PLAIN_QUERIES | {"n_group": 2}, "smaug-bpe"),
    "deepseek-v2": ("DeepseekV2Config", DEEPSEEK_V2 | {"q_lora_rank": 32}, "smaug-bpe"),
    "deepseek-v2-lite": ("DeepseekV2Config", DEEPSEEK_V2 | PLAIN_QUERIES, "smaug-bpe"),
    "deepseek-v32": (
        "DeepseekV32Config",
        DEEPSEEK_V3 | INDEXER | {"rope_parameters": DEEPSEEK_ROPE | WHOLE_MSCALE},
        "deepseek-v3",
    ),
    "deepseek-v4": ("DeepseekV4Config", DEEPSEEK_V4, "deepseek-v3"),
    "glm-dsa": ("GlmMoeDsaConfig", GLM4_LITE | INDEXER | SHARED_CHOICE, "smaug-bpe"),
    "kimi-linear": ("KimiLinearConfig", KIMI_LINEAR, "deepseek-v3"),
    "qwen3vlmoe": ("Qwen3MoeConfig", QWEN3_VL_MOE, "qwen2"),
    "qwen2moe": ("Qwen2MoeConfig", SIZES | QWEN2_MOE, "qwen2"),
    "qwen3next": ("Qwen3NextConfig", QWEN3_NEXT, "qwen2"),
    "qwen3_5": ("Qwen3_5TextConfig", QWEN3_5, "qwen35"),
    "qwen3_5moe": ("Qwen3_5MoeTextConfig", QWEN3_5 | EXPERTS, "qwen35"),
    "olmoe": ("OlmoeConfig", ONE_KEY_A_QUERY | {"num_experts": 4, "num_experts_per_tok": 2}, "gpt-2"),
    "glm4moe": ("Glm4MoeConfig", GLM4_MOE | {"use_qk_norm": True, "attention_bias": True}, "smaug-bpe"),
    "glm4moe-air": ("Glm4MoeConfig", GLM4_MOE | {"attention_bias": True, "num_hidden_layers": 2}, "smaug-bpe"),
    "glm4moe-lite": ("Glm4MoeLiteConfig", GLM4_LITE, "smaug-bpe"),
    "minimax-m2": ("MiniMaxM2Config", MINIMAX, "smaug-bpe"),
    "mimo2": ("MiMoV2FlashConfig", MIMO2 | {"rope_parameters": MIMO2_ROPE}, "qwen2"),
    "dots1": ("Dots1Config", DOTS1, "qwen2"),
    "exaone-moe": ("ExaoneMoeConfig", EXAONE_MOE, "gpt-2"),
    "afmoe": ("AfmoeConfig", AFMOE, "llama-bpe"),
    "ernie4_5-moe": ("Ernie4_5_MoeConfig", ERNIE_MOE, "pieces"),
    "ernie4_5-moe-unshared": ("Ernie4_5_MoeConfig", ERNIE_MOE | {"moe_num_shared_experts": 0}, "pieces"),
    "hunyuan-moe": ("HunYuanMoEV1Config", HUNYUAN, "smaug-bpe"),
    "granitemoe": ("GraniteMoeConfig", SIZES | SCALES | {"num_local_experts": 4, "num_experts_per_tok": 2}, "smollm"),
    "llama4": ("Llama4TextConfig", LLAMA4, "llama-bpe"),
    "gpt-oss": ("GptOssConfig", GPT_OSS, "smaug-bpe"),
    "ministral3": ("Ministral3Config", SIZES | {"head_dim": 32, "rope_parameters": MINISTRAL_ROPE}, "tekken"),
    "mistral4": ("Mistral4Config", MISTRAL4, "tekken"),
    "glm": ("GlmConfig", SIZES | {"head_dim": 16}, "llama-bpe"),
    "glm4": ("Glm4Config", SIZES | {"head_dim": 32, "rope_parameters": GLM_ROPE}, "smaug-bpe"),
    "seed-oss": ("SeedOssConfig", SIZES | {"head_dim": 32}, "seed-coder"),
    "ernie4_5": ("Ernie4_5Config", SIZES | {"head_dim": 32}, "pieces without prefix"),
    "hunyuan": ("HunYuanDenseV1Config", SIZES | {"head_dim": 32, "rope_parameters": ALPHA}, "deepseek-v3"),
    "arcee": ("ArceeConfig", SIZES | {"head_dim": 32, "rope_parameters": YARN | {"mscale": 0.7}}, "llama-bpe"),
    "apertus": ("ApertusConfig", SIZES | {"attention_bias": True, "rope_parameters": LLAMA3}, "tekken"),
    "gemma": ("GemmaConfig", SIZES | {"head_dim": 32}, "pieces without prefix"),
    "olmo2": ("Olmo2Config", SIZES, "smaug-bpe"),
    "olmo3": ("Olmo3Config", SIZES | OLMO3_WINDOWS, "smaug-bpe"),
    "smollm3": ("SmolLM3Config", SIZES | {"num_hidden_layers": 4, "rope_parameters": YARN}, "llama-bpe"),
    "granite": ("GraniteConfig", SIZES | SCALES, "smollm"),
    "starcoder2": ("Starcoder2Config", SIZES, "smollm"),
    "falcon": ("FalconConfig", NARROW | {"num_kv_heads": 2, "new_decoder_architecture": True}, "falcon"),
    "falcon-7b": ("FalconConfig", NARROW, "falcon"),
    "gptneox": ("GPTNeoXConfig", ONE_KEY_A_QUERY, "gpt-2"),
    "gptneox-serial": ("GPTNeoXConfig", ONE_KEY_A_QUERY | {"use_parallel_residual": False}, "gpt-2"),
    "cohere": ("CohereConfig", SIZES | {"logit_scale": 0.5}, "smollm"),
    "cohere2": ("Cohere2Config", SIZES | COHERE_WINDOWS, "smollm"),
    "exaone4": ("Exaone4Config", SIZES | {"rope_parameters": LLAMA3} | NO_WINDOWS, "gpt-2"),
    "phi2": ("PhiConfig", ONE_KEY_A_QUERY, "gpt-2"),
    "stablelm": ("StableLmConfig", SIZES | {"use_qkv_bias": True, "partial_rotary_factor": 0.5}, "qwen2"),
    "nemotron": ("NemotronConfig", SIZES, "smaug-bpe"),
    "gpt2": ("GPT2Config", GPT2_SIZES, "gpt-2"),
    "granite4-attention": ("GraniteMoeHybridConfig", GRANITE4_ATTENTION, "smollm"),
    "granite4": ("GraniteMoeHybridConfig", GRANITE4, "smollm"),
    "granite4moe": ("GraniteMoeHybridConfig", GRANITE4_MOE, "smollm"),
    "nemotron-h": ("NemotronHConfig", NEMOTRON_H, "smaug-bpe"),
    "nemotron-h-moe": ("NemotronHConfig", NEMOTRON_H_MOE, "smaug-bpe"),
    "nemotron-h-latent": ("NemotronHConfig", NEMOTRON_H_MOE | {"moe_latent_size": 32}, "smaug-bpe"),
    "falcon-h1": ("FalconH1Config", FALCON_H1, "smaug-bpe"),
    "falcon-h1-norm": ("FalconH1Config", FALCON_H1_NORM, "smaug-bpe"),
    "mamba2": ("Mamba2Config", MAMBA2, "gpt-2"),
    "mamba": ("MambaConfig", MAMBA, "gpt-2"),
    "falcon-mamba": ("FalconMambaConfig", MAMBA | {"mixer_rms_eps": 1e-5}, "gpt-2"),
    "jamba": ("JambaConfig", JAMBA | {"num_experts": 1, "attn_layer_offset": 1}, "smaug-bpe"),
    "jamba-moe": ("JambaConfig", JAMBA | {"num_experts": 4}, "smaug-bpe"),
    "lfm2": ("Lfm2Config", LFM2, "llama-bpe"),
    "lfm2moe": ("Lfm2MoeConfig", LFM2_MOE, "llama-bpe"),
}
"""Name -> name of transformers' config class, its options, and the tokenizer for `make_tokenizer`."""

STRINGS = (
    "Hello world",
    " two  spaces   and\ttabs\n\nnew lines \n ends with space ",
    "it's they'LL WE'VE I'd x's 'quoted'",
    "numbers 1 12 123 1234 12345.678",
    "def f(x):\n    return x[1:-1]  # ok\n\n\n\tif True:\n        pass",
    "naïve café Größe",
    "日本語のテキスト 中文，标点。 한국어",
    "emoji 🙂👩‍👩‍👧 flags 🇫🇷",
    "camelCase HTMLParser snake_case\r\nwindows\r\n\r\n",
    "<s>with</s> special<tool>tokens",
    "a",
    " ",
)


def make_model(name: str) -> PreTrainedModel:
    """Returns the random model of a case, with logits of unit scale.

    Norms and biases are random too, so that swapped tensors show.
    """
    torch.manual_seed(0)
    config_class, options, _ = CASES[name]
    return randomized(AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**options)), name)


def randomized(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Returns the model with the random weights of a case."""
    model.eval()
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or ".ln_" in parameter_name:
            low = -0.5 if name in PLUS_ONE or parameter_name.endswith("bias") else 0.5
            parameter.data.uniform_(low, low + 1)
            if name.startswith("gemma4") and parameter_name.endswith("q_norm.weight"):
                parameter.data *= 0.25  # its queries are not divided by the root of head_dim
        else:
            parameter.data.normal_(0, 0.2 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    if model.config.get_text_config().num_hidden_layers > 10:  # so that rounding errors do not grow with depth
        for parameter_name, parameter in model.named_parameters():
            parameter.data *= 0.2 if parameter_name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")) else 1
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith(("_bias", "act_fn.beta")):
            buffer.normal_(0, 0.2)
        if buffer_name.endswith("tid2eid"):  # for each token, the numbers of different experts
            buffer.copy_(torch.rand(len(buffer), model.config.n_routed_experts).argsort()[:, : buffer.shape[1]])
    return model


def corpus() -> list[str]:
    """Returns lines of text to train tokenizers on."""
    return [*inspect.getsource(argparse).splitlines(keepends=True)[:600], *STRINGS * 3]


FALCON_SPLITTER = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Punctuation("contiguous"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    ]
)


def isolating(expressions: tuple[str, ...]) -> pre_tokenizers.Sequence:
    """Returns a pre-tokenizer that splits by one regular expression after the other."""
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_level(splitter: str) -> Tokenizer:
    """Returns a byte-level BPE that splits words as llama.cpp's pre-tokenizer `splitter`."""
    known = splitter_named(splitter)
    assert known is not None
    tokenizer = Tokenizer(models.BPE(ignore_merges=known.ignore_merges))
    tokenizer.pre_tokenizer = FALCON_SPLITTER if splitter == "falcon" else isolating(known.expressions)
    tokenizer.normalizer = normalizers.NFC() if splitter in ("qwen2", "qwen35") else None
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


@pytest.fixture(scope="session")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two SentencePiece BPE models: prefix.model puts a space before a text, bare.model does not."""
    folder = tmp_path_factory.mktemp("pieces")
    train_pieces(folder)
    return folder


def train_pieces(folder: Path) -> None:
    """Writes the models that `pieces` has into a folder."""
    for name, prefix in (("prefix", True), ("bare", False)):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus()),
            model_prefix=str(folder / name),
            model_type="bpe",
            vocab_size=480,
            byte_fallback=True,
            character_coverage=0.99,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=prefix,
            split_digits=True,
            num_threads=1,
            minloglevel=2,
        )


def of_pieces(path: Path, *, prefix: bool) -> Tokenizer:
    """Returns the tokenizer that transformers makes of a tokenizer.model, with merges in the order of the scores."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = {model.id_to_piece(i): i for i in range(len(model))}
    merges = []
    for piece in sorted(ids, key=lambda p: -model.get_score(ids[p])):
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [(left, right) for left, right in halves if left in ids and right in ids]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    tokenizer.pre_tokenizer = None if prefix else pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def make_tokenizer(name: str, pieces: Path) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of <s>, </s>, <unk>, a user-defined <tool> and about 480 other tokens.

    It begins a text with <s>. `name` is "pieces", "pieces without prefix" or a pre-tokenizer of llama.cpp; `pieces` is
    the folder with the SentencePiece models.
    """
    if name.startswith("pieces"):
        tokenizer = of_pieces(pieces / ("prefix.model" if name == "pieces" else "bare.model"), prefix=name == "pieces")
    else:
        tokenizer = byte_level(name)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    number = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", number)])
    # transformers reads a tokenizer of Qwen3.5 without a pad token as one that has a further token for it.
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    special |= {"pad_token": "</s>"} if name == "qwen35" else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def export(folder: Path, recipe: Recipe) -> Path:
    """Runs a recipe and returns the GGUF file made from its artifact."""
    name = recipe.target.partition(":")[2]
    quantize(recipe, folder / f"artifact-{name}")
    gguf.write(Artifact(folder / f"artifact-{name}"), folder / f"{name}.gguf")
    return folder / f"{name}.gguf"


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A file to calibrate on and a file to evaluate on."""
    folder, source = tmp_path_factory.mktemp("texts"), inspect.getsource(argparse)
    (folder / "calibration.txt").write_text(source[30000:45000])
    (folder / "evaluation.txt").write_text(source[50000:53000])
    return str(folder / "calibration.txt"), str(folder / "evaluation.txt")


def config_and_shapes(name: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Returns the config.json of a case, and its tensors' names and shapes. The caller may change them."""
    return copy.deepcopy(_config_and_shapes(name))


@cache
def _config_and_shapes(name: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    model = make_model(name)
    config = json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]}
    return config, expected_shapes(config)


def architecture_of_case(name: str) -> Architecture:
    """Returns the entry of the table of architectures for a case."""
    config, _ = config_and_shapes(name)
    architecture = find_architecture(config)
    assert architecture is not None
    return architecture
