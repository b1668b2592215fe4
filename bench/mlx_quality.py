"""Compares lqexport's MLX folders with mlx-lm's own converter, of the same types and bytes, all judged in mlx-lm.

    python bench/mlx_quality.py MODEL --work FOLDER --evaluation FILE [FILE ...] [--bits 2 3 4 5 6] [--dtype bfloat16]
        [-- OPTION ...]

For each number of bits, in groups of 64, the script makes a folder by `mlx_lm.convert` and one by `lqexport quantize`,
to which it passes the options behind `--`. mlx-lm runs both: its logits, of the weights as mlx decodes them, in
float32, are compared with the source's over windows of 512 tokens. Finished folders and figures in FOLDER are reused.
With `--dtype` the source is the model in another dtype. Prints Markdown, then JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import solved, split_arguments, written_bytes
from judging import predictions, windows_of
from transformers import AutoModelForCausalLM

from lqexport.converters.models.rope import former_rope
from lqexport.evaluation import evaluate
from lqexport.evaluation.logits import engine_logits
from lqexport.evaluation.mlx_process import MlxProcess
from lqexport.evaluation.protocols import LLAMACPP_512
from lqexport.models.blocks import BlockModel
from lqexport.models.source import Source, open_source

PROTOCOL = LLAMACPP_512


def in_dtype(model: str, dtype: str, folder: Path) -> Path:
    """Makes a copy of a model in another dtype."""
    if not folder.exists():
        shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*"), copy_function=shutil.copy)
        AutoModelForCausalLM.from_pretrained(model, dtype=dtype).save_pretrained(folder)
    return folder


def with_former_settings(model: str, folder: Path) -> Path:
    """Copies a model, with the rotary settings as transformers 4 writes them, too: mlx-lm's Llama reads only those."""
    if not folder.exists():
        shutil.copytree(model, folder, copy_function=shutil.copy)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(config | former_rope(config)))
    return folder


def converted(model: str, bits: int, folder: Path) -> Path:
    """Makes a folder by mlx-lm's converter, which rounds to nearest."""
    if not folder.exists():
        copy = with_former_settings(model, folder.with_name("source"))
        options = [
            "--hf-path",
            str(copy),
            "-q",
            "--q-bits",
            str(bits),
            "--q-group-size",
            "64",
            "--mlx-path",
            str(folder),
        ]
        subprocess.run([sys.executable, "-m", "mlx_lm", "convert", *options], check=True)
    return folder


class Judge:
    """Compares mlx-lm's logits of folders with the source's on one text. The source's are computed once, if needed."""

    def __init__(self, source: Source, text: Path, windows: int, work: Path) -> None:
        self._source, self.text, self._work = source, text, work
        self._windows = windows_of(source, str(text), windows)
        self._reference: list[Any] = []

    def __call__(self, folder: Path) -> dict[str, Any]:
        """Returns the figures of a folder, which are kept in the work folder."""
        kept = self._work / f"{folder.name}-{self.text.stem}-{len(self._windows)}.json"
        if kept.is_file():
            return json.loads(kept.read_text())
        self._reference = self._reference or list(predictions(BlockModel(self._source), self._windows))
        with MlxProcess(folder, patience=7200) as engine:
            test = engine_logits(engine, self._windows, PROTOCOL)
            result = evaluate.compare(self._reference, test, self._windows, PROTOCOL)
        figures = {"bytes": written_bytes(folder), "kl": result.kl, "kl_error": result.kl_error, "top1": result.top1,
                   "perplexity": result.perplexity, "source": result.reference_perplexity}  # fmt: skip
        kept.write_text(json.dumps(figures))
        return figures


def cells(figures: dict[str, Any]) -> str:
    """Returns the cells of the table for one text."""
    return f" {figures['kl']:.4f} ± {figures['kl_error']:.4f} | {figures['perplexity']:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, nargs="+", required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 5, 6])
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--dtype", choices=["float16", "bfloat16"])
    arguments, options = split_arguments(parser)
    work, dtype = arguments.work, arguments.dtype
    work.mkdir(parents=True, exist_ok=True)
    model = str(in_dtype(arguments.model, dtype, work / dtype)) if dtype else arguments.model
    judges = [Judge(open_source(model), text, arguments.windows, work) for text in arguments.evaluation]
    rows = []
    print("| bits | made by | MB |" + "".join(f" KL, {judge.text.stem} | perplexity |" for judge in judges))
    print("|---|---|---|" + "---|---|" * len(judges))
    for bits in arguments.bits:
        target = ["--target", f"mlx:{bits}-g64", *options]
        for label, folder in (
            ("mlx_lm.convert", converted(model, bits, work / f"converted-{bits}")),
            ("lqexport", solved(model, work / f"lqexport-{bits}", "to-mlx", target)),
        ):
            figures = [judge(folder) for judge in judges]
            rows.append({"bits": bits, "method": label, "figures": figures})
            print(f"| {bits} | {label} | {figures[0]['bytes'] / 1e6:.1f} |" + "".join(map(cells, figures)), flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
