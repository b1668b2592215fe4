"""Compares lqexport's MLX folders with mlx-lm's own GPTQ and dynamic quants, at the same bytes, all judged in mlx-lm.

    python bench/mlx_peers.py MODEL --work FOLDER --evaluation FILE [FILE ...] [--samples 16] [--only NAME ...]
        [-- OPTION ...]

mlx-lm's tools calibrate on the sequences that lqexport draws by default, in place of a text that they would download.
They run as their command lines start them, but for this: on a CPU mlx multiplies in float16 and bfloat16 slowly, so
passes, and GPTQ's solver, work on the model in float32; what they store has the model's dtype. lqexport gets the
options behind `--`. Finished folders and figures in FOLDER are reused, those of bench/mlx_quality.py too. Prints
Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from common import split_arguments
from mlx_quality import Judge, cells, solved, with_former_settings

from lqexport.calibration.sequences import load_calibration
from lqexport.evaluation.mlx_lm import share_matrix_products
from lqexport.models.source import open_source
from lqexport.recipe import Recipe


@dataclass(frozen=True)
class Peer:
    """One of mlx-lm's tools, and lqexport's options for a folder of the same bytes.

    make      makes a folder of a source from calibration tokens [sequences, length]
    lqexport  the name of lqexport's folder
    options   of lqexport, where {bytes} stands for those of the peer's tensors
    """

    make: Callable[[Path, Path, Any], None]
    lqexport: str
    options: tuple[str, ...]


def run_tool(tool: ModuleType, arguments: list[str], tokens: Any, replaced: dict[str, Any]) -> None:
    """Runs the `main` of one of mlx-lm's tools on our calibration tokens, with some of its functions replaced."""
    replaced = {"load_data": lambda *_, **__: tokens} | replaced
    with mock.patch.multiple(tool, **replaced), mock.patch.object(sys, "argv", [tool.__name__, *arguments]):
        tool.main()


def gptq(source: Path, folder: Path, tokens: Any, bits: int, embedding: int) -> None:
    """mlx-lm's GPTQ: linears of `bits` bits, and the embedding, which it rounds, of others."""
    import mlx.core as mx
    from mlx_lm.quant import gptq as tool

    load, save = tool.load, tool.save

    def load_float32(*given: Any, **named: Any) -> Any:
        loaded = load(*given, **named)
        loaded[0].set_dtype(mx.float32)
        return loaded

    def save_in_its_dtype(path: str, source: str, model: Any, tokenizer: Any, config: dict[str, Any]) -> None:
        model.set_dtype(getattr(mx, config.get("dtype") or config["torch_dtype"]))
        save(path, source, model, tokenizer, config)

    arguments = ["--model", str(source), "--mlx-path", str(folder), "--bits", str(bits)]
    replaced = {"load": load_float32, "save": save_in_its_dtype}
    run_tool(tool, [*arguments, "--fallback-bits", str(embedding)], tokens, replaced)


def dynamic(source: Path, folder: Path, tokens: Any, low: int, high: int, bits_per_weight: float) -> None:
    """mlx-lm's dynamic quants: each module in one of two widths, by the gradient of its rounding error."""
    import mlx.core as mx
    from mlx_lm.quant import dynamic_quant as tool

    model, _ = tool.load(str(source))[:2]
    model.set_dtype(mx.float32)
    sensitivities = folder.with_name(f"{folder.name}-sensitivities.json")
    sensitivities.write_text(json.dumps(tool.estimate_sensitivities(model, tokens, low, 64, high, 64)))
    arguments = ["--model", str(source), "--mlx-path", str(folder), "--sensitivities", str(sensitivities)]
    arguments += ["--low-bits", str(low), "--high-bits", str(high), "--target-bpw", str(bits_per_weight)]
    run_tool(tool, arguments, tokens, {})


AUTO = ("--target", "mlx:auto", "--size", "{bytes}B")
PEERS = {
    "gptq-2": Peer(lambda *given: gptq(*given, 2, 2), "lqexport-2", ("--target", "mlx:2-g64")),
    "gptq-4": Peer(lambda *given: gptq(*given, 4, 4), "lqexport-4", ("--target", "mlx:4-g64")),
    "gptq-4-embedding-6": Peer(
        lambda *given: gptq(*given, 4, 6), "lqexport-4-embedding-6",
        ("--target", "mlx:4-g64", "--embedding-type", "mlx:6-g64"),
    ),
    "dynamic-3-4": Peer(lambda *given: dynamic(*given, 3, 4, 4.0), "lqexport-auto-3-4", AUTO),
    "dynamic-4-5": Peer(lambda *given: dynamic(*given, 4, 5, 5.0), "lqexport-auto-4-5", AUTO),
}  # fmt: skip
"""Name -> the tool. GPTQ rounds embeddings to 6 bits by default; it has 2, 4 and 8 bits. 4, 5 and 5.0 are the defaults
of dynamic quants."""


def made(name: str, model: str, work: Path, samples: int) -> Path:
    """Makes a peer's folder, unless it is there."""
    folder = work / name
    if not folder.exists():
        share_matrix_products()
        import mlx.core as mx

        recipe = Recipe(model, "mlx:4-g64")
        drawn = load_calibration(
            recipe.calibration, open_source(model).tokenizer(), samples=samples,
            sequence_length=recipe.sequence_length, seed=recipe.seed,
        )  # fmt: skip
        start = time.process_time()
        PEERS[name].make(with_former_settings(model, work / "source"), folder, mx.array(drawn.tokens.numpy()))
        print(f"{name} took {time.process_time() - start:.0f} processor seconds", file=sys.stderr)
    return folder


def tensor_bytes(folder: Path) -> int:
    """Returns the bytes of the tensors of a folder of mlx-lm."""
    return json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]["total_size"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, nargs="+", required=True)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS))
    arguments, options = split_arguments(parser)
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    judges = [Judge(open_source(arguments.model), text, arguments.windows, work) for text in arguments.evaluation]
    print("| made by | MB |" + "".join(f" KL, {judge.text.stem} | perplexity |" for judge in judges))
    print("|---|---|" + "---|---|" * len(judges))
    for name in arguments.only:
        peer, theirs = PEERS[name], made(name, arguments.model, work, arguments.samples)
        print_row(theirs, judges)
        given = [option.format(bytes=tensor_bytes(theirs)) for option in peer.options]
        print_row(solved(arguments.model, work / peer.lqexport, [*given, *options]), judges)


def print_row(folder: Path, judges: list[Judge]) -> None:
    """Prints the row of a folder, which is judged on every text."""
    figures = [judge(folder) for judge in judges]
    print(f"| {folder.name} | {figures[0]['bytes'] / 1e6:.1f} |" + "".join(map(cells, figures)), flush=True)


if __name__ == "__main__":
    main()
