"""Our GGUF files beside llama.cpp's own quantizer, at the same type and size, all judged in llama.cpp.

    python bench/gguf_quality.py MODEL --calibration FILE --evaluation FILE --work FOLDER [--types Q2_K Q3_K Q4_K]

For each pure type (embedding and output Q8_0): `llama-quantize` alone, `llama-quantize` with an importance matrix from
32 x 512 tokens of the calibration text, and ours by each method asked for. The judge is llama.cpp on each file against
the source in float32: mean KL divergence and perplexity over windows of 512. For ours, what llama.cpp loads is also
compared with the solved values, bit for bit. Finished artifacts in FOLDER are used again. Prints Markdown, then JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import comparison_parser
from judging import predictions, windows_of

from lqexport.calibration.sequences import load_calibration
from lqexport.converters.gguf import writer as gguf
from lqexport.converters.gguf.reader import GGUFModel
from lqexport.converters.models.tensor_names import gguf_names
from lqexport.evaluation import evaluate, llamacpp
from lqexport.formats.registry import codec_named
from lqexport.models.blocks import BlockModel
from lqexport.models.source import Source, open_source
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.storage.artifact import Artifact


def importance_matrix(source: Source, text: str, samples: int) -> dict[str, np.ndarray]:
    """What llama-imatrix collects: mean of x^2 per input column of every linear, by GGUF weight name."""
    tokens = load_calibration(text, source.tokenizer(), samples=samples, sequence_length=512, seed=0).tokens
    model = BlockModel(source)
    names = gguf_names(model.architecture, len(model))
    hidden = [model.start(ids[None]) for ids in tokens]
    means = {}
    for index, block in model.blocks():
        sums = {}
        for linear in model.linears(index):
            name = names[model.weight_name(index, linear)]
            sums[name] = torch.zeros(block.get_submodule(linear).in_features, dtype=torch.float64)
            block.get_submodule(linear).register_forward_pre_hook(_adding(sums[name]))
        with torch.no_grad():
            hidden = [model.run(block, state) for state in hidden]
        means |= {name: (total / tokens.numel()).float().numpy() for name, total in sums.items()}
    return means


def _adding(total: torch.Tensor) -> Callable[..., None]:
    def add(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        total.add_(arguments[0].double().square().sum((0, 1)))

    return add


def ours(recipe: Recipe, work: Path, label: str) -> Path:
    """Quantize and export by the recipe; the path of the GGUF file."""
    file = work / f"{label}.gguf"
    began = time.perf_counter()
    quantize(recipe, work / label, cache=work / "cache")
    if not file.is_file():
        gguf.write(Artifact(work / label), file)
    print(f"{label}: {time.perf_counter() - began:.0f} s", flush=True)
    return file


def loads_as_solved(artifact: Artifact, file: Path, work: Path) -> bool:
    """Whether the values that llama.cpp decodes from the file equal the artifact's, bit for bit."""
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
    """llama.cpp's logits of a file against the source's, which are computed once."""

    def __init__(self, source: Source, text: str, windows: int) -> None:
        self.windows = windows_of(source, text, windows)
        self.reference = list(predictions(BlockModel(source), self.windows))

    def __call__(self, file: Path, adapter: Path | None = None) -> evaluate.Evaluation:
        # As many threads as torch: on a busy machine more of them wait for each other.
        with llamacpp.LlamaCpp(file, 512, torch.get_num_threads(), adapter) as engine:
            test = evaluate.engine_logits(engine, self.windows, evaluate.LLAMACPP_512)
            return evaluate.compare(self.reference, test, self.windows, evaluate.LLAMACPP_512)


def row(label: str, kind: str, file: Path, judge: Judge, exact: bool | None) -> dict[str, Any]:
    result = judge(file)
    entry = {"type": kind, "method": label, "bytes": file.stat().st_size, "kl": result.kl, "kl_error": result.kl_error,
             "perplexity": result.perplexity, "perplexity_error": result.perplexity_error,
             "reference_perplexity": result.reference_perplexity, "top1": result.top1, "bitwise": exact}  # fmt: skip
    print(json.dumps(entry), flush=True)
    return entry


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    work: Path = arguments.work
    source = open_source(arguments.model)
    half = ours(Recipe(arguments.model, "gguf:F16", method="rtn"), work, "F16")
    matrix = importance_matrix(source, arguments.calibration, 32)
    judge = Judge(source, arguments.evaluation, arguments.windows)
    rows = [row("F16", "F16", half, judge, loads_as_solved(Artifact(work / "F16"), half, work))]
    for kind in arguments.types:
        for label, given in (("llama-quantize", None), ("llama-quantize, imatrix", matrix)):
            file = work / f"llama-{kind}.gguf"
            mix = f"{kind}_M" if kind in ("Q3_K", "Q4_K", "Q5_K") else kind  # `pure` makes it the type itself
            llamacpp.quantize(half, file, mix, imatrix=given, pure=True, token_embedding="Q8_0", output="Q8_0")
            rows.append(row(label, kind, file, judge, None))
        for moments in arguments.moments:
            recipe = Recipe(arguments.model, f"gguf:{kind}", calibration=arguments.calibration,
                            samples=arguments.samples, moments=moments, prefix=arguments.prefix, tune=arguments.tune,
                            compute_dtype=arguments.compute_dtype)  # fmt: skip
            label = f"{kind}-{moments}-{arguments.samples}-{arguments.tune}"
            file = ours(recipe, work, label)
            exact = loads_as_solved(Artifact(work / label), file, work)
            rows.append(row(f"lqexport, {moments} moments, tune {arguments.tune}", kind, file, judge, exact))
    return rows


def figures(entry: dict[str, Any]) -> str:
    """Size, KL, perplexity and agreement of a `row`, as cells of a table."""
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
    parser.add_argument("--moments", nargs="+", default=["normalized"])
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
