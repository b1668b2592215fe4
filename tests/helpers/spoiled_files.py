"""Makes small models whose predictions are not flat, right files of them, and files that are spoiled in one place."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lqexport.converters.gguf.writer import write
from lqexport.converters.targets import plan
from lqexport.models.source import open_source
from lqexport.solver.linear import round_tensor
from lqexport.storage.artifact import Artifact
from lqexport.target import Target

Change = Callable[[dict[str, Tensor]], None]
"""Changes the tensors of a source before they are rounded."""
SIZES: dict[str, Any] = {
    "vocab_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0,
    "max_position_embeddings": 512, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
CLASSES: dict[str, Any] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "untied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": False}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": False}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"head_dim": 32, "sliding_window": 64, "query_pre_attn_scalar": 32}),
}


def save_sharp(folder: Path, kind: str, tokenizer: Path, hidden: int = 128) -> Path:
    """Writes a random model whose attention and predictions are not flat, with norms and biases that are random too.

    tokenizer   the folder whose tokenizer is copied, of 512 tokens
    """
    model_class, config_class, options = CLASSES[kind]
    config = config_class(**SIZES, hidden_size=hidden, intermediate_size=2 * hidden, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data.uniform_(-0.5, 0.5).add_(0 if kind == "gemma2" else 1)
            elif parameter.ndim == 1:
                parameter.data.normal_(0, 0.5)
            else:
                parameter.data.normal_(0, 0.12 if "embed" in name or "head" in name else hidden**-0.5)
    model.to(torch.float16).save_pretrained(folder)
    for path in tokenizer.glob("*token*"):
        shutil.copy(path, folder)
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


def with_scales_off(path: Path, name: str, factor: float, blocks: int) -> Path:
    """Multiplies the float16 scale of the first blocks of a tensor, in a file of Q8_0 or Q4_0."""
    (tensor,) = (entry for entry in gguf.GGUFReader(path, "r+").tensors if entry.name == name)
    rows = tensor.data.reshape(len(tensor.data), -1)
    size = 34 if tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0 else 18
    for block in range(blocks):
        scale = rows[0, block * size : block * size + 2].view(np.float16)
        scale *= np.float16(factor)
    tensor.data.base.flush() if hasattr(tensor.data.base, "flush") else None
    return path
