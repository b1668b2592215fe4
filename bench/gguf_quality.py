"""Compares lqexport's GGUF files with llama.cpp's own quantizer, at the same type and size, all judged in llama.cpp.

    python bench/gguf_quality.py MODEL --calibration FILE --evaluation FILE --work FOLDER [--types Q2_K Q3_K Q4_K]
        [--also FILE ...] [--methods NAME ...] [--plot FILE]

For each pure type (embedding and output Q8_0), the script makes a file by `llama-quantize` alone, one by
`llama-quantize` with an importance matrix from 32 x 512 tokens of the calibration text, lqexport's from the same matrix
without passes, and lqexport's for each choice of moments. llama.cpp runs every file. Its logits are compared with the
source's in float32: mean KL divergence and perplexity over windows of 512 tokens, on every text. Of lqexport's files
from passes, the values that llama.cpp decodes are also compared with the solved values, bit for bit. Finished artifacts
and figures in FOLDER are reused. Prints Markdown. The plot (SVG) shows mean KL on the first text over size.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import comparison_parser
from judging import predictions, windows_of
from matplotlib.figure import Figure

from lqexport.calibration.make_imatrix import make_imatrix
from lqexport.converters.gguf import writer as gguf
from lqexport.converters.gguf.reader import GGUFModel
from lqexport.evaluation import evaluate, llamacpp, llamacpp_quantizer
from lqexport.evaluation.logits import engine_logits
from lqexport.evaluation.protocols import LLAMACPP_512
from lqexport.formats.registry import codec_named
from lqexport.models.blocks import BlockModel
from lqexport.models.source import Source, open_source
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.storage.artifact import Artifact

NEED_MATRIX = ("IQ1", "IQ2", "IQ3_XXS")
"""Types that llama-quantize makes with an importance matrix alone."""
MIX_OF = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "IQ2_S": "IQ2_M"}
"""Type -> the mix of llama.cpp that has it as its main type, where the mix is not called as the type."""
BARE, MATRIX, FITTED, SOLVED = METHODS = (
    "llama-quantize", "llama-quantize, imatrix", "lqexport, imatrix", "lqexport",
)  # fmt: skip
"""How a file is made; the last two without and with passes over the calibration text."""


def ours(recipe: Recipe, work: Path, label: str) -> Path:
    """Quantizes and exports by the recipe. Returns the path of the GGUF file."""
    file = work / f"{label}.gguf"
    began = time.perf_counter()
    quantize(recipe, work / label, cache=work / "cache")
    if not file.is_file():
        gguf.write(Artifact(work / label), file)
    print(f"{label}: {time.perf_counter() - began:.0f} s", flush=True)
    return file


def loads_as_solved(artifact: Artifact, file: Path, work: Path) -> bool:
    """Returns whether the values that llama.cpp decodes from the file equal the artifact's, bit for bit."""
    decoded_file = work / "decoded.gguf"
    llamacpp_quantizer.quantize(file, decoded_file, "F32", requantize=True)
    decoded = GGUFModel(decoded_file)
    for name in artifact.manifest():
        tensor = artifact.read(name)
        values = codec_named(tensor.codec_name).decode(tensor.planes, tensor.shape[-1]).reshape(tensor.shape)
        if not np.array_equal(values.view(np.uint32), np.asarray(decoded.read(name)).view(np.uint32)):
            return False
    return True


class Judge:
    """Compares llama.cpp's logits of a file with the source's, which are computed once."""

    def __init__(self, source: Source, text: str, windows: int) -> None:
        self.windows = windows_of(source, text, windows)
        self.reference = list(predictions(BlockModel(source), self.windows))

    def __call__(self, file: Path, adapter: Path | None = None) -> evaluate.Evaluation:
        # As many threads as torch has: on a busy machine, more threads would wait for each other.
        with llamacpp.LlamaCpp(file, 512, torch.get_num_threads(), adapter) as engine:
            test = engine_logits(engine, self.windows, LLAMACPP_512)
            return evaluate.compare(self.reference, test, self.windows, LLAMACPP_512)


class Table:
    """The figures of the files, of which each is measured once; `quality.json` in the work folder keeps them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.work: Path = arguments.work
        self.texts: list[str] = [arguments.evaluation, *arguments.also]
        self._source, self._windows = open_source(arguments.model), arguments.windows
        self._judges: dict[str, Judge] = {}
        self._path = self.work / "quality.json"
        self.rows: list[dict[str, Any]] = json.loads(self._path.read_text()) if self._path.is_file() else []

    def has(self, label: str, tensor_type: str) -> bool:
        """Returns whether the figures of a file are there."""
        return any((row["method"], row["type"]) == (label, tensor_type) for row in self.rows)

    def add(self, label: str, tensor_type: str, file: Path, exact: bool | None = None) -> None:
        """Judges a file on every text. Keeps and prints its figures."""
        entry = {"type": tensor_type, "method": label, "bytes": file.stat().st_size, "bitwise": exact}
        for text in self.texts:
            if text not in self._judges:
                self._judges[text] = Judge(self._source, text, self._windows)
            result = self._judges[text](file)
            names = ("kl", "kl_error", "perplexity", "perplexity_error", "top1", "reference_perplexity")
            entry[Path(text).stem] = {name: getattr(result, name) for name in names}
        print(json.dumps(entry), flush=True)
        self.rows.append(entry)
        self._path.write_text(json.dumps(self.rows, indent=1))


def measure(arguments: argparse.Namespace, table: Table) -> None:
    """Makes and judges every file that is not in the table."""
    work = table.work
    half = ours(Recipe(arguments.model, "gguf:F16", method="rtn"), work, "F16")
    matrix = work / "imatrix.gguf"
    if not matrix.is_file():
        make_imatrix(arguments.model, matrix, calibration=arguments.calibration, samples=32, device="cpu")
    if not table.has("F16", "F16"):
        table.add("F16", "F16", half, loads_as_solved(Artifact(work / "F16"), half, work))
    for tensor_type in arguments.types:
        for label in (BARE, MATRIX):
            unmade = label == BARE and tensor_type.startswith(NEED_MATRIX)
            if label in arguments.methods and not unmade and not table.has(label, tensor_type):
                table.add(label, tensor_type, llama_cpps(half, tensor_type, matrix if label == MATRIX else None, work))
        recipe = Recipe(arguments.model, f"gguf:{tensor_type}", imatrix=str(matrix))
        if FITTED in arguments.methods and not table.has(FITTED, tensor_type):
            table.add(FITTED, tensor_type, ours(recipe, work, f"{tensor_type}-imatrix"))
        if SOLVED in arguments.methods:
            solved(arguments, table, tensor_type)


def llama_cpps(half: Path, tensor_type: str, imatrix: Path | None, work: Path) -> Path:
    """Quantizes by llama.cpp into one type, embedding and output in Q8_0. Returns the path of the GGUF file."""
    file = work / f"llama-{tensor_type}.gguf"
    # With `pure`, llama-quantize uses the mix's main type alone.
    mix = MIX_OF.get(tensor_type, tensor_type)
    llamacpp_quantizer.quantize(half, file, mix, imatrix=imatrix, pure=True, token_embedding="Q8_0", output="Q8_0")
    return file


def solved(arguments: argparse.Namespace, table: Table, tensor_type: str) -> None:
    """Makes and judges lqexport's files of a type, one for every choice of moments."""
    for moments in arguments.moments:
        recipe = Recipe(arguments.model, f"gguf:{tensor_type}", calibration=arguments.calibration,
                        samples=arguments.samples, moments=moments, prefix=arguments.prefix, tune=arguments.tune,
                        compute_dtype=arguments.compute_dtype)  # fmt: skip
        method = f"{SOLVED}, {moments} moments, {recipe.samples} sequences, tuned on {recipe.tuned_sequences}"
        if table.has(method, tensor_type):
            continue
        label = f"{tensor_type}-{moments}-{arguments.samples}-{recipe.tuned_sequences}"
        file = ours(recipe, table.work, label)
        table.add(method, tensor_type, file, loads_as_solved(Artifact(table.work / label), file, table.work))


def figures(entry: dict[str, Any]) -> str:
    """Returns KL, perplexity and agreement on a text as table cells."""
    return (
        f"{entry['kl']:.4f} ± {entry['kl_error']:.4f} | {entry['perplexity']:.2f} ± {entry['perplexity_error']:.2f} | "
        f"{entry['top1']:.1%}"
    )


def markdown(table: Table) -> str:
    names = [Path(text).stem for text in table.texts]
    heads = [f"{title}, {name}" for name in names for title in ("mean KL", "perplexity", "same top-1")]
    lines = [f"| type | method | MB | {' | '.join(heads)} | loads bitwise |", f"|{'---|' * (4 + len(heads))}"]
    for entry in table.rows:
        exact = {True: "yes", False: "NO", None: ""}[entry["bitwise"]]
        cells = [
            entry["type"],
            entry["method"],
            f"{entry['bytes'] / 1e6:.1f}",
            *(figures(entry[name]) for name in names),
        ]
        lines.append(f"| {' | '.join([*cells, exact])} |")
    return "\n".join(lines)


def plot(table: Table, path: Path) -> None:
    """Writes a plot of KL over size, with one line for llama-quantize and one for lqexport."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    name = Path(table.texts[0]).stem
    for method, color in ((MATRIX, "tab:gray"), (SOLVED, "tab:blue")):
        chosen = [row for row in table.rows if row["method"].startswith(method) and row["method"] != FITTED]
        chosen.sort(key=lambda row: (row["bytes"], row[name]["kl"]))
        sizes, losses = [row["bytes"] / 1e6 for row in chosen], [row[name]["kl"] for row in chosen]
        axes.plot(sizes, losses, "o-", color=color, label=method)
        for row, size, loss in zip(chosen, sizes, losses, strict=True):
            axes.annotate(row["type"], (size, loss), textcoords="offset points", xytext=(4, 4), fontsize=7, color=color)
    axes.set_yscale("log")
    axes.set_xlabel("MB")
    axes.set_ylabel("mean KL, nats")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = comparison_parser(__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--types", nargs="+", default=["Q2_K", "Q3_K", "Q4_K"])
    parser.add_argument("--moments", nargs="*", default=["normalized"])
    parser.add_argument("--prefix", choices=["full", "quantized"])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tune", type=int, help="sequences of tuning; by default what `quantize` takes for the type")
    parser.add_argument("--also", nargs="*", default=[], help="further evaluation texts")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--compute-dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--windows", type=int, default=12)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    table = Table(arguments)
    measure(arguments, table)
    print(markdown(table))
    if arguments.plot:
        plot(table, arguments.plot)


if __name__ == "__main__":
    main()
