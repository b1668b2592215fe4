"""Makes small models whose predictions are not flat, right files of them, and files that are spoiled in one place."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)  # fmt: skip

from lqexport.converters.gguf.writer import write
from lqexport.converters.targets import plan
from lqexport.models.source import open_source
from lqexport.solver.rounded_tensor import round_tensor
from lqexport.storage.artifact import Artifact
from lqexport.target import Target

Change = Callable[[dict[str, Tensor]], None]
"""Changes the tensors of a source before they are rounded."""
SIZES: dict[str, Any] = {
    "vocab_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0,
    "max_position_embeddings": 512, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
FAR, NEAR = "full_attention", "sliding_attention"
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
LATENT = {"kv_lora_rank": 64, "q_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
LATENT |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}
GEMMA_ROPE = {
    FAR: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    NEAR: {"rope_type": "default", "rope_theta": 1e4},
}
TEMPLATES = {
    "chat": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
}
"""Model -> its chat template."""
CLASSES: dict[str, Any] = {
    "chat": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "untied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": False}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": False}),
    "llama3": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "qwen3": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {"head_dim": 32, "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {"head_dim": 32, "sliding_window": 64, "query_pre_attn_scalar": 32, "layer_types": [NEAR, NEAR, FAR]}
        | {"rope_parameters": GEMMA_ROPE},
    ),
    "qwen3moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, EXPERTS | {"head_dim": 32, "tie_word_embeddings": False}),
    "deepseek": (
        DeepseekV2ForCausalLM,
        DeepseekV2Config,
        LATENT
        | {"moe_intermediate_size": 64, "num_key_value_heads": 4, "routed_scaling_factor": 1.5}
        | {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    ),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"head_dim": 32, "sliding_window": 64, "query_pre_attn_scalar": 32}),
}
CLASSES["gemma2-long"] = (
    *CLASSES["gemma2"][:2],
    CLASSES["gemma2"][2] | {"sliding_window": 700, "max_position_embeddings": 1024},
)


def save_sharp(folder: Path, family: str, tokenizer: Path, hidden: int = 128) -> Path:
    """Writes a random model whose attention and predictions are not flat, with norms and biases that are random too.

    family      one of `CLASSES`
    tokenizer   the folder whose tokenizer is copied, of 512 tokens
    """
    model_class, config_class, options = CLASSES[family]
    config = config_class(**(SIZES | {"hidden_size": hidden, "intermediate_size": 2 * hidden} | options))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data.uniform_(-0.5, 0.5).add_(0 if family.startswith("gemma") else 1)
            elif parameter.ndim == 1:
                parameter.data.normal_(0, 0.5)
            else:
                parameter.data.normal_(0, 0.12 if "embed" in name or "head" in name else hidden**-0.5)
    model.to(torch.float16).save_pretrained(folder)
    for path in tokenizer.glob("*token*"):
        shutil.copy(path, folder)
    if family in TEMPLATES:
        (folder / "chat_template.jinja").write_text(TEMPLATES[family], encoding="utf-8")
    return folder


def rounded_to(model: Path, folder: Path, target: str, change: Change | None = None) -> Artifact:
    """Writes the model, changed first if `change` is given, rounded to nearest as a finished artifact."""
    source, artifact = open_source(str(model)), Artifact(folder)
    artifact.begin({"recipe": {"target": target}})
    source.copy_model_files(artifact.model_folder)
    planned = plan(Target.parse(target), source.config, {name: source.shape(name) for name in source.names()})
    tensors = {tensor.name: source.read(tensor.name).float() for tensor in planned}
    if change:
        change(tensors)
    for tensor in planned:
        artifact.write(round_tensor(tensor.name, tensors[tensor.name], tensor.codec_name))
    artifact.finish([tensor.name for tensor in planned], {"tensors": []})
    return artifact


def gguf_file(
    model: Path, folder: Path, target: str, change: Change | None = None, keys: Mapping[str, float] | None = None
) -> Path:
    """Writes a GGUF file of the model, spoiled by `change`, and by other values of numbers in its metadata."""
    path = folder / "model.gguf"
    write(rounded_to(model, folder / "artifact", target, change), path)
    reader = gguf.GGUFReader(path, "r+")
    for key, value in (keys or {}).items():
        field = reader.fields[key]
        field.parts[field.data[0]][0] = value
    reader.data.flush()
    return path
