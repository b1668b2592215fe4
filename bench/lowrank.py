"""Measures what a low-rank correction gains in llama.cpp, compared with spending the same bytes on a wider type.

    python bench/lowrank.py MODEL --calibration FILE --evaluation FILE --work FOLDER [--samples 16] [--windows 12]

The script judges pure types (embedding and output Q8_0) without a correction; Q2_K and Q3_K with adapters of several
ranks and types, which are cut from one correction of rank 96 in float32; and Q2_K with a correction that was solved in
two rounds. llama.cpp runs every file, and the bytes are those of the files. Second moments are normalized, and there is
no end-to-end tuning. Artifacts that a stopped run left in FOLDER are not solved again. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from common import comparison_parser
from gguf_quality import Judge, figures

from lqexport.converters.factors import A, block_codec, corrected_linear, is_factor
from lqexport.converters.gguf import adapter as gguf_adapter
from lqexport.converters.gguf import writer as gguf
from lqexport.evaluation.evaluate import Evaluation
from lqexport.models.source import open_source
from lqexport.pipeline.quantize import quantize
from lqexport.pipeline.ranks import cut, share_ranks
from lqexport.planning.recipe_plan import plan_recipe
from lqexport.recipe import Recipe
from lqexport.solver.rounded_tensor import round_tensor
from lqexport.storage.artifact import Artifact, values_of

LARGEST = 96
VARIANTS = [(16, "F16"), (32, "F16"), (64, "F16"), (32, "Q8_0"), (64, "Q8_0")]


def artifact(arguments: argparse.Namespace, tensor_type: str, name: str, **options: Any) -> tuple[Artifact, Recipe]:
    """Makes an artifact, or reuses a finished one of an earlier run. Returns it and its recipe."""
    recipe = Recipe(arguments.model, f"gguf:{tensor_type}", calibration=arguments.calibration,
                    samples=arguments.samples, moments="normalized", prefix="full", tune=0, **options)  # fmt: skip
    quantize(recipe, arguments.work / name)
    return Artifact(arguments.work / name), recipe


def adapter(large: Artifact, ranks: dict[str, int], factor_type: str, work: Path) -> Path:
    """Writes a GGUF adapter with the first ranks of each correction of `large`, rounded to `factor_type`."""
    folder = work / "cut"
    shutil.rmtree(folder, ignore_errors=True)
    small, names = Artifact(folder), []
    small.begin(large.run())
    shutil.copytree(large.model_folder, small.model_folder)
    for name in filter(is_factor, large.manifest()):
        stored, rank = large.read(name), ranks[corrected_linear(name)]
        if rank:
            rows, columns = stored.shape
            shortened = cut(stored, (rank, columns) if name.endswith(A) else (rows, rank))
            small.write(round_tensor(name, values_of(shortened), block_codec(factor_type, "factors")))
            names.append(name)
    small.finish(names, {})
    gguf_adapter.write(small, work / "adapter.gguf")
    return work / "adapter.gguf"


def shared_ranks(large: Artifact, arguments: argparse.Namespace, recipe: Recipe, rank: int) -> dict[str, int]:
    """Returns ranks that take as many bytes in total as `rank` for every linear, divided by the gain of each linear."""
    linears = [tensor for tensor in plan_recipe(open_source(arguments.model), recipe) if tensor.linear]
    numbers = sum(rank * sum(tensor.matrix) for tensor in linears)
    copy = Artifact(arguments.work / "shared")
    shutil.rmtree(copy.folder, ignore_errors=True)
    shutil.copytree(large.folder, copy.folder)
    # `share_ranks` reads only these three fields of a job.
    job = SimpleNamespace(
        recipe=replace(recipe, factor_bytes=4 * numbers),
        artifact=copy,
        linears={tensor.name: tensor for tensor in linears},
    )
    return share_ranks(job)  # type: ignore[arg-type]


def row(tensor_type: str, label: str, file: Path, result: Evaluation, adapter: Path | None = None) -> dict[str, Any]:
    """Returns the figures of a file and its adapter."""
    sizes = [path.stat().st_size for path in (file, adapter) if path]
    return {
        "type": tensor_type, "label": label, "bytes": sum(sizes), "kl": result.kl, "kl_error": result.kl_error,
        "perplexity": result.perplexity, "perplexity_error": result.perplexity_error, "top1": result.top1,
    }  # fmt: skip


def corrected(arguments: argparse.Namespace, judge: Judge, tensor_type: str) -> Iterator[dict[str, Any]]:
    """Yields the figures of a file alone, and then with adapters that are cut from one correction."""
    large, recipe = artifact(arguments, tensor_type, tensor_type, rank=LARGEST, factors="F32")
    base = arguments.work / f"{tensor_type}.gguf"
    gguf.write(large, base)
    yield row(tensor_type, "none", base, judge(base))
    linears = {corrected_linear(name) for name in large.manifest() if is_factor(name)}
    for rank, factors in VARIANTS:
        file = adapter(large, dict.fromkeys(linears, rank), factors, arguments.work)
        yield row(tensor_type, f"rank {rank}, {factors}", base, judge(base, file), file)
    file = adapter(large, shared_ranks(large, arguments, recipe, 32), "F16", arguments.work)
    yield row(tensor_type, "rank 32 on average, shared, F16", base, judge(base, file), file)


def in_rounds(arguments: argparse.Namespace, judge: Judge, tensor_type: str) -> Iterator[dict[str, Any]]:
    """Yields the figures of a file with a correction that was solved in two rounds."""
    stored, _ = artifact(arguments, tensor_type, f"{tensor_type}-rounds", rank=32, rounds=2)
    base, file = arguments.work / f"{tensor_type}-rounds.gguf", arguments.work / "adapter.gguf"
    gguf.write(stored, base)
    gguf_adapter.write(stored, file)
    yield row(tensor_type, "rank 32, F16, 2 rounds", base, judge(base, file), file)


def plain(arguments: argparse.Namespace, judge: Judge, tensor_type: str) -> Iterator[dict[str, Any]]:
    """Yields the figures of a file without a correction."""
    base = arguments.work / f"{tensor_type}.gguf"
    gguf.write(artifact(arguments, tensor_type, tensor_type)[0], base)
    yield row(tensor_type, "none", base, judge(base))


STAGES = [("Q2_K", corrected), ("Q3_K", corrected), ("Q4_K", plain), ("IQ4_XS", plain), ("Q2_K", in_rounds)]


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| type | correction | MB | mean KL | perplexity | same top-1 |", "|---|---|---|---|---|---|"]
    for entry in sorted(rows, key=lambda entry: entry["bytes"]):
        lines.append(f"| {entry['type']} | {entry['label']} | {entry['bytes'] / 1e6:.1f} | {figures(entry)} |")
    return "\n".join(lines)


def main() -> None:
    parser = comparison_parser(__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--windows", type=int, default=12)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    judge = Judge(open_source(arguments.model), arguments.evaluation, arguments.windows)
    rows = []
    for tensor_type, stage in STAGES:
        for measured in stage(arguments, judge, tensor_type):
            rows.append(measured)
            print(json.dumps(measured), flush=True)
    print(markdown(rows))


if __name__ == "__main__":
    main()
