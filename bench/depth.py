"""Does memory depend on a model's depth? Peaks of quantize, to-gguf and verify on random Llamas, made block by block.

    python bench/depth.py --work FOLDER [--layers 2 8] [--hidden 512] [--intermediate 1536] [--vocabulary 512] [-- ...]

The model is never in memory: each block is a safetensors file of its own. What follows `--` goes to `quantize`.
Prints JSON: for each depth the bytes of the model, and of each command the seconds and the peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

OPTIONS = ["--target", "gguf:Q4_K", "--samples", "8", "--sequence-length", "64", "--descent", "1", "--tune", "2"]
STEADY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""Environment in which what is freed goes back to the system at once, as large tensors do anyhow: the C library keeps
tensors of some MB, so that small models seem to need more the longer they run."""
WORDS = 400
"""Different words of the text."""


def write_model(folder: Path, layers: int, hidden: int, intermediate: int, vocabulary: int) -> None:
    """A random Llama in float16 with one file per block, a tokenizer of whole words, and a text beside it."""
    folder.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 256), tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"], dtype="float16",
    )  # fmt: skip
    config.save_pretrained(folder)
    draw, files = torch.Generator().manual_seed(0), {}
    for part, shapes in _parts(config):
        tensors = {name: _random(shape, draw) for name, shape in shapes.items()}
        save_file(tensors, folder / f"{part}.safetensors", {"format": "pt"})
        files |= dict.fromkeys(tensors, f"{part}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    words = random.Random(0).choices([f"w{number}" for number in range(WORDS)], k=20_000)
    (folder / "text.txt").write_text(" ".join(words))
    _tokenizer(words).save_pretrained(folder)


def _tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most 512 tokens that llama.cpp knows too."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), split])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=[special], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(words)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special, eos_token=special)


def _random(shape: tuple[int, ...], draw: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.float16)
    return (torch.randn(shape, generator=draw) * shape[-1] ** -0.5).half()


def _parts(config: LlamaConfig) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """Files of the model with the shapes of their tensors: the outer ones, then block by block."""
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * (hidden // config.num_attention_heads)
    outer = (config.vocab_size, hidden)
    yield "outer", {"model.embed_tokens.weight": outer, "model.norm.weight": (hidden,), "lm_head.weight": outer}
    rows = {"q": hidden, "k": keys, "v": keys, "o": hidden}
    block: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj": (count, hidden) for name, count in rows.items()}
    block |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    block |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    for index in range(config.num_hidden_layers):
        yield f"block-{index}", {f"model.layers.{index}.{name}.weight": shape for name, shape in block.items()}


def commands(folder: Path, options: list[str]) -> dict[str, list[str]]:
    """The arguments of each command for the model in `folder`/model."""
    model, out, file = (str(folder / name) for name in ("model", "out", "model.gguf"))
    text = str(folder / "model" / "text.txt")
    return {
        "quantize": ["quantize", model, out, "--calibration", text, "--device", "cpu", *options],
        "to-gguf": ["to-gguf", out, file],
        "verify": ["verify", file, "--against", model, "--text", text, "--windows", "1", "--max-perplexity-ratio", "0"],
    }


def run_here(folder: Path, options: list[str]) -> dict[str, float]:
    """Run the commands in this process; the peak resident bytes of the process in each (on Linux alone; elsewhere of
    all up to there)."""
    from lqexport.cli import app
    from lqexport.environment import peak_memory

    peaks, reset = {}, Path("/proc/self/clear_refs")
    for name, arguments in commands(folder, options).items():
        if reset.exists():
            reset.write_text("5", encoding="utf-8")  # the peak becomes what is resident now (proc_pid_clear_refs(5))
        if status := app(arguments, standalone_mode=False):
            sys.exit(f"{name} ended with exit status {status}.")
        peaks[name] = peak_memory()
    return peaks


def run_apart(folder: Path, options: list[str]) -> dict[str, Any]:
    """Run each command in a process of its own: its seconds and peak resident bytes."""
    code = (
        "import resource, subprocess, sys; subprocess.run([sys.executable, '-m', 'lqexport', *sys.argv[1:]],"
        "check=True, stdout=2); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    )
    found = {}
    for name, arguments in commands(folder, options).items():
        began = time.perf_counter()
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | STEADY)
        found[name] = {"seconds": time.perf_counter() - began, "peak_bytes": int(done.stdout.split()[-1])}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8])
    for name, default in (("hidden", 512), ("intermediate", 1536), ("vocabulary", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given, options = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :] or OPTIONS
    result = {}
    for layers in given.layers:
        folder = given.work / str(layers)
        write_model(folder / "model", layers, given.hidden, given.intermediate, given.vocabulary)
        model_bytes = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
        result[layers] = {"model_bytes": model_bytes, **run_apart(folder, options)}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
