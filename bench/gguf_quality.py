"""Compares lqexport's GGUF files with llama.cpp's own quantizer, at the same type and size, all judged in llama.cpp.

    python bench/gguf_quality.py MODEL --calibration FILE --evaluation FILE --work FOLDER [--types Q2_K Q3_K Q4_K]

For each pure type (embedding and output Q8_0), the script makes a file by `llama-quantize` alone, one by
`llama-quantize` with an importance matrix from 32 x 512 tokens of the calibration text, lqexport's from the same matrix
without passes, and lqexport's for each choice of moments. llama.cpp runs every file. Its logits are compared with the
source's in float32: mean KL divergence and perplexity over windows of 512 tokens. Of lqexport's files from passes, the
values that llama.cpp decodes are also compared with the solved values, bit for bit. Finished artifacts in FOLDER are
reused. Prints Markdown, then JSON.
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

from lqexport.calibration.make_imatrix import make_imatrix
from lqexport.converters.gguf import writer as gguf
from lqexport.converters.gguf.reader import GGUFModel
from lqexport.evaluation import evaluate, llamacpp
from lqexport.formats.registry import codec_named
from lqexport.models.blocks import BlockModel
from lqexport.models.source import Source, open_source
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.storage.artifact import Artifact

NEED_MATRIX = ("IQ1", "IQ2", "IQ3_XXS")
"""Types that llama-quantize makes with an importance matrix alone."""


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
    llamacpp.quantize(file, decoded_file, "F32", requantize=True)
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
            test = evaluate.engine_logits(engine, self.windows, evaluate.LLAMACPP_512)
            return evaluate.compare(self.reference, test, self.windows, evaluate.LLAMACPP_512)


def row(label: str, tensor_type: str, file: Path, judge: Judge, exact: bool | None) -> dict[str, Any]:
    """Judges a file. Returns and prints its figures."""
    result = judge(file)
    entry = {"type": tensor_type, "method": label, "bytes": file.stat().st_size, "kl": result.kl,
             "kl_error": result.kl_error, "perplexity": result.perplexity, "perplexity_error": result.perplexity_error,
             "reference_perplexity": result.reference_perplexity, "top1": result.top1, "bitwise": exact}  # fmt: skip
    print(json.dumps(entry), flush=True)
    return entry


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Makes and judges every file. Returns their figures."""
    work: Path = arguments.work
    source = open_source(arguments.model)
    half = ours(Recipe(arguments.model, "gguf:F16", method="rtn"), work, "F16")
    matrix = work / "imatrix.gguf"
    if not matrix.is_file():
        make_imatrix(arguments.model, matrix, calibration=arguments.calibration, samples=32, device="cpu")
    judge = Judge(source, arguments.evaluation, arguments.windows)
    rows = [row("F16", "F16", half, judge, loads_as_solved(Artifact(work / "F16"), half, work))]
    for tensor_type in arguments.types:
        plain = [] if tensor_type.startswith(NEED_MATRIX) else [("llama-quantize", None)]
        for label, imatrix in (*plain, ("llama-quantize, imatrix", matrix)):
            file = work / f"llama-{tensor_type}.gguf"
            # With `pure`, llama-quantize uses the mix's main type alone.
            mix = f"{tensor_type}_M" if tensor_type in ("Q3_K", "Q4_K", "Q5_K") else tensor_type
            llamacpp.quantize(half, file, mix, imatrix=imatrix, pure=True, token_embedding="Q8_0", output="Q8_0")
            rows.append(row(label, tensor_type, file, judge, None))
        recipe = Recipe(arguments.model, f"gguf:{tensor_type}", imatrix=str(matrix))
        rows.append(row("lqexport, imatrix", tensor_type, ours(recipe, work, f"{tensor_type}-imatrix"), judge, None))
        for moments in arguments.moments:
            recipe = Recipe(arguments.model, f"gguf:{tensor_type}", calibration=arguments.calibration,
                            samples=arguments.samples, moments=moments, prefix=arguments.prefix, tune=arguments.tune,
                            compute_dtype=arguments.compute_dtype)  # fmt: skip
            label = f"{tensor_type}-{moments}-{arguments.samples}-{arguments.tune}"
            file = ours(recipe, work, label)
            exact = loads_as_solved(Artifact(work / label), file, work)
            rows.append(row(f"lqexport, {moments} moments, tune {arguments.tune}", tensor_type, file, judge, exact))
    return rows


def figures(entry: dict[str, Any]) -> str:
    """Returns size, KL, perplexity and agreement of a `row` as table cells."""
    return (
        f"{entry['bytes'] / 1e6:.1f} | {entry['kl']:.4f} ± {entry['kl_error']:.4f} | {entry['perplexity']:.2f} ± "
        f"{entry['perplexity_error']:.2f} | {entry['top1']:.1%}"
    )


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| type | method | MB | mean KL | perplexity | same top-1 | loads bitwise |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in rows:
        exact = {True: "yes", False: "NO", None: ""}[entry["bitwise"]]
        lines.append(f"| {entry['type']} | {entry['method']} | {figures(entry)} | {exact} |")
    return "\n".join(lines)


def main() -> None:
    parser = comparison_parser(__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--types", nargs="+", default=["Q2_K", "Q3_K", "Q4_K"])
    parser.add_argument("--moments", nargs="*", default=["normalized"])
    parser.add_argument("--prefix", choices=["full", "quantized"])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tune", type=int, default=64)
    parser.add_argument("--compute-dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--windows", type=int, default=12)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows = measure(arguments)
    print(markdown(rows))
    (arguments.work / "quality.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
