"""Measures how memory and time of quantize, to-gguf and verify depend on the depth of a random Llama.

    python bench/depth.py --work FOLDER [--layers 2 8] [--hidden 512] [--intermediate 1536] [--vocabulary 512]
        [--experts 0] [--device cpu] [--limit 6GB] [-- ...]

The model is made block by block and is never in memory as a whole: each block is its own safetensors file. With
`--experts` it is a Qwen3-MoE whose experts are `--intermediate` wide, and each token goes to eight of them. The
arguments after `--` go to `quantize`. `--limit` limits the memory of every command (bench/peak.py says which memory).

Prints two tables, and writes their figures to FOLDER/depth.json. The first table has the bytes of the model at each
depth, and the seconds and the peak memory of each command. The second table has the seconds of each stage, beside the
least that this machine could take for the stage's operations and bytes (bench/floors.py). Only one depth is on the disk
at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import solving_seconds, split_arguments
from safetensors.torch import save_file
from stages import timed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

OPTIONS = ["--target", "gguf:Q4_K", "--samples", "8", "--sequence-length", "64", "--descent", "1", "--tune", "2"]
STEADY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""Environment variables that make the C library return freed memory to the system at once.

It always does so for large tensors. It keeps freed tensors of a few MB, so small models would seem to need more memory
the longer they run."""
WORDS = 400
"""The number of different words in the text."""

Config = LlamaConfig | Qwen3MoeConfig


def write_model(folder: Path, layers: int, hidden: int, intermediate: int, vocabulary: int, experts: int = 0) -> None:
    """Writes a random Llama or Qwen3-MoE in float16 with one file per block, its tokenizer, and a calibration text."""
    folder.mkdir(parents=True)
    width = 128 if (hidden >= 2048 and experts) or hidden >= 4096 else 64
    options = {
        "vocab_size": vocabulary, "hidden_size": hidden, "num_hidden_layers": layers, "tie_word_embeddings": False,
        "num_attention_heads": hidden // width, "num_key_value_heads": max(1, hidden // (4 * width)),
    }  # fmt: skip
    config: Config
    if experts:
        config = Qwen3MoeConfig(
            **options, num_experts=experts, num_experts_per_tok=min(8, experts), moe_intermediate_size=intermediate,
            norm_topk_prob=True, head_dim=width, architectures=["Qwen3MoeForCausalLM"], dtype="float16",
        )  # fmt: skip
    else:
        config = LlamaConfig(
            **options, intermediate_size=intermediate, architectures=["LlamaForCausalLM"], dtype="float16"
        )
    config.save_pretrained(folder)
    pool, draw, files = _pool(config), random.Random(0), {}
    for file, shapes in _files(config):
        tensors = {name: _random(shape, pool, draw) for name, shape in shapes.items()}
        save_file(tensors, folder / f"{file}.safetensors", {"format": "pt"})
        files |= dict.fromkeys(tensors, f"{file}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    words = random.Random(0).choices([f"w{number}" for number in range(WORDS)], k=20_000)
    (folder / "text.txt").write_text(" ".join(words))
    _tokenizer(words).save_pretrained(folder)


def _tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE of at most 512 tokens, of a type that llama.cpp can read."""
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


def _inner(config: Config) -> int:
    """Returns the width of the MLP, or of an expert."""
    return config.moe_intermediate_size if isinstance(config, Qwen3MoeConfig) else config.intermediate_size


def _pool(config: Config) -> torch.Tensor:
    """Returns normal float16 numbers for the largest matrix, and 2^20 more.

    Matrices are slices with different starts, since drawing every number would take longer than writing it.
    """
    largest = config.hidden_size * max(config.vocab_size, config.hidden_size, _inner(config))
    return torch.randn(largest + (1 << 20), generator=torch.Generator().manual_seed(0)).half()


def _random(shape: tuple[int, ...], pool: torch.Tensor, draw: random.Random) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.float16)
    start = draw.randrange(1 << 20)
    return pool[start : start + shape[0] * shape[1]].view(shape) * shape[1] ** -0.5


def _files(config: Config) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """Yields the model's files with the shapes of their tensors: those outside the blocks, then block by block."""
    hidden, inner, width = config.hidden_size, _inner(config), config.hidden_size // config.num_attention_heads
    keys, outer = config.num_key_value_heads * width, (config.vocab_size, hidden)
    yield "outer", {"model.embed_tokens.weight": outer, "model.norm.weight": (hidden,), "lm_head.weight": outer}
    rows = {"q": hidden, "k": keys, "v": keys, "o": hidden}
    block: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj": (count, hidden) for name, count in rows.items()}
    mlps = ["mlp"]
    if isinstance(config, Qwen3MoeConfig):
        mlps = [f"mlp.experts.{number}" for number in range(config.num_experts)]
        block |= {"mlp.gate": (config.num_experts, hidden), "self_attn.q_norm": (width,), "self_attn.k_norm": (width,)}
    for mlp in mlps:
        block |= {
            f"{mlp}.gate_proj": (inner, hidden),
            f"{mlp}.up_proj": (inner, hidden),
            f"{mlp}.down_proj": (hidden, inner),
        }
    block |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    for index in range(config.num_hidden_layers):
        yield f"block-{index}", {f"model.layers.{index}.{name}.weight": shape for name, shape in block.items()}


def commands(folder: Path, options: list[str], device: str = "cpu") -> dict[str, list[str]]:
    """Returns the arguments of each command for the model in `folder`/model."""
    model, out, file = (str(folder / name) for name in ("model", "out", "model.gguf"))
    text, one = str(folder / "model" / "text.txt"), ["--windows", "1", "--max-perplexity-ratio", "0"]
    return {
        "quantize": ["quantize", model, out, "--calibration", text, "--device", device, *options],
        "to-gguf": ["to-gguf", out, file],
        "verify": ["verify", file, "--against", model, "--text", text, "--device", device, *one],
    }


def run_here(folder: Path, options: list[str]) -> dict[str, float]:
    """Runs the commands in this process. Returns the peak resident bytes of the process in each.

    Only Linux can reset the peak; elsewhere it is that of all commands so far.
    """
    from lqexport.cli.app import app
    from lqexport.runtime.environment import peak_memory

    peaks, reset = {}, Path("/proc/self/clear_refs")
    for name, arguments in commands(folder, options).items():
        if reset.exists():
            reset.write_text("5", encoding="utf-8")  # resets the peak to the current size (proc_pid_clear_refs(5))
        if status := app(arguments, standalone_mode=False):
            sys.exit(f"{name} ended with exit status {status}.")
        peaks[name] = peak_memory()
    return peaks


def run_apart(folder: Path, options: list[str], device: str, limit: int) -> dict[str, Any]:
    """Runs each command in its own process with at most `limit` bytes of memory (0: no limit).

    Returns its seconds, those of its stages, and its peak bytes, resident and on a GPU.
    """
    results = {}
    for name, arguments in commands(folder, options, device).items():
        command = [sys.executable, str(Path(__file__).with_name("peak.py")), str(limit), *arguments]
        ran = timed(command, os.environ | STEADY)
        peaks = json.loads(ran.printed.splitlines()[-1])
        results[name] = {"seconds": ran.seconds, "stages": ran.stages, **peaks}
    return results


def took(artifact: Path, ran: dict[str, Any]) -> dict[str, float]:
    """Returns the seconds of each stage that bench/floors.py names.

    The log has the seconds of solving and writing each linear. The rest of the stages that solve linears is "passes".
    """
    seconds, solving = ran["quantize"]["stages"], solving_seconds(artifact)
    return {
        "rounding": seconds["Rounding embeddings and norms"],
        "passes": seconds.get("Forward pass", 0.0) + seconds["Quantizing"] - solving,
        "solving": solving,
        "tuning": seconds.get("Predictions of the source", 0.0) + seconds.get("Tuning end to end", 0.0),
        "to-gguf": ran["to-gguf"]["seconds"],
        "verify": ran["verify"]["seconds"],
    }


def measured(given: argparse.Namespace, layers: int, options: list[str]) -> dict[str, Any]:
    """Makes, runs and measures one depth, and then deletes its files."""
    import floors

    from lqexport.sizes import memory_size

    folder = given.work / str(layers)
    write_model(folder / "model", layers, given.hidden, given.intermediate, given.vocabulary, given.experts)
    model_bytes = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
    ran = run_apart(folder, options, given.device, memory_size(given.limit) if given.limit else 0)
    work = floors.work_of(folder / "out")
    machine = floors.measured(given.work, given.device, work.recipe.compute_dtype_on(given.device.partition(":")[0]))
    stages = {name: {"seconds": seconds} for name, seconds in took(folder / "out", ran).items()}
    for name, (operations, moved) in floors.floors(work, machine).items():
        stages[name] |= {"operations": operations, "bytes": moved}
    shutil.rmtree(folder)
    return {"model_bytes": model_bytes, "commands": ran, "stages": stages, "machine": vars(machine)}


def tables(result: dict[int, dict[str, Any]]) -> Iterator[str]:
    """Yields the printed lines: memory and seconds by depth and their growth, then the stages of the last depth."""
    yield "| layers | model GB | command | seconds | resident GB | device GB |\n|---|---|---|---|---|---|"
    for layers, depth in result.items():
        for name, ran in depth["commands"].items():
            yield (
                f"| {layers} | {depth['model_bytes'] / 1e9:.2f} | {name} | {ran['seconds']:.1f} "
                f"| {ran['peak_bytes'] / 1e9:.3f} | {ran.get('device_peak_bytes', 0) / 1e9:.3f} |"
            )
    yield from _growth(result)
    layers, last = list(result.items())[-1]
    yield f"\n| stage, {layers} layers | seconds | operations, least | bytes, least |\n|---|---|---|---|"
    for name, stage in last["stages"].items():
        yield f"| {name} | {stage['seconds']:.1f} | {stage['operations']:.2f} | {stage['bytes']:.2f} |"
    rates = last["machine"]
    yield (
        f"\nMatrix products: {rates['float32'] / 1e12:.3f} (float32), {rates['passes'] / 1e12:.3f} (passes), "
        f"{rates['float64'] / 1e12:.3f} (float64) TFLOP/s; disk: {rates['read'] / 1e9:.2f} GB/s read, "
        f"{rates['write'] / 1e9:.2f} written"
    )


def _growth(result: dict[int, dict[str, Any]]) -> Iterator[str]:
    """Yields the growth of each command's peak memory, and its seconds for one layer and for 32.

    The seconds are those of a straight line through the first and the last depth.
    """
    (fewest, first), *_, (most, last) = [*result.items(), *result.items()]
    if fewest == most:
        return
    yield ""
    for name, ran in last["commands"].items():
        before = first["commands"][name]
        layer = (ran["seconds"] - before["seconds"]) / (most - fewest)
        yield (
            f"{name}: {ran['peak_bytes'] / before['peak_bytes'] - 1:+.1%} resident from {fewest} to {most} layers; "
            f"{layer:.2f} s a layer, by a straight line {before['seconds'] + (32 - fewest) * layer:.0f} s for 32"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8])
    for name, default in (("hidden", 512), ("intermediate", 1536), ("vocabulary", 512), ("experts", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit")
    given, options = split_arguments(parser)
    options = options or OPTIONS
    result: dict[int, dict[str, Any]] = {}
    for layers in given.layers:
        result[layers] = measured(given, layers, options)
        (given.work / "depth.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(tables(result)))


if __name__ == "__main__":
    main()
