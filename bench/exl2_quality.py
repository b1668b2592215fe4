"""Judges EXL2 folders of several sizes against the source, beside ExLlamaV2's own recipe and GGUF files.

    python bench/exl2_quality.py MODEL --calibration FILE --evaluation FILE --work FOLDER [--bits 2.5 3 4] [--gguf Q3_K]

lqexport's folder is quantized with `--target exl2`, written by `to-exl2`, and judged from the folder. The baseline is
ExLlamaV2's recipe for one matrix, written anew from its description: act-order, dampening 0.12, each group's scales
searched just before the group is solved (97 multipliers, sum of |error|^3.5 over all rows), and error feedback. Its own
search over mixes takes hours, so it is given the mixes that lqexport's allocation chose (`same widths`), and nearly the
same width for every matrix (`even widths`). Both have lqexport's output layer and embedding, so all folders of a size
take the same bytes. The files of `--gguf` are lqexport's too. They have one type for all linears, and Q8_0 for
embedding and output (EXL2 has float16 and 6 bits there). Finished artifacts in FOLDER are reused. Prints Markdown.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import comparison_parser
from judging import Judge
from torch import Tensor

from lqexport.calibration.collect import by_weight, forward_moments
from lqexport.calibration.sequences import load_calibration
from lqexport.converters.exl2 import writer as exl2
from lqexport.converters.exl2.plan import plan_exl2
from lqexport.converters.gguf import writer as gguf
from lqexport.evaluation import evaluate
from lqexport.formats.exl2 import Exl2, runs_named
from lqexport.grids.grid import half
from lqexport.grids.sections import SquaredSection, TensorSections, squared_scale
from lqexport.models.blocks import BlockModel
from lqexport.models.source import GGUFSource, Source, open_source
from lqexport.models.written import Export, open_export
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.solver.cholesky import CholeskyFactor, factorize
from lqexport.solver.feedback import feedback
from lqexport.storage.artifact import Artifact, StoredTensor

MULTIPLIERS = torch.linspace(0.70, 1.20, 97)
Codecs = dict[str, str]
Choice = tuple[float, str]
"""The bits that were asked for, and how the widths were chosen."""


def searched_section(group: Tensor, bits: int) -> SquaredSection:
    """Searches ExLlamaV2's scales of one group of columns [R, g], whose weights earlier errors have moved."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    base = 2 * group.abs().amax(1) / (2**bits - 1)
    largest = base.max()
    subs = ((16 * (base / largest.clamp_min(1e-10)).sqrt()).round() - 1).clamp(0, 15).to(torch.int16)
    errors = []
    for multiplier in MULTIPLIERS:
        scale = squared_scale(half(largest * multiplier), subs)[:, None]
        level = (group / torch.where(scale == 0, torch.inf, scale)).round().clamp(low, high)
        error = (group - scale * level).abs()
        errors.append((error * error * error * error.sqrt()).sum())  # |error|^3.5
    maximum = half(largest * MULTIPLIERS[torch.stack(errors).argmin()])
    levels = torch.arange(low, high + 1, dtype=torch.float32)[None]
    return SquaredSection(levels, group.shape[1], maximum[None], subs[:, None])


def converted(codec: Exl2, weight: Tensor, hessian: Tensor) -> tuple[TensorSections, Tensor]:
    """Returns grid and codes of a matrix by ExLlamaV2's recipe. Each group's scales fit the weights that earlier errors
    have moved."""
    cholesky = factorize(hessian, 0.12, act_order=True)
    remaining, upper = weight[:, cholesky.order].contiguous(), cholesky.rows(slice(0, weight.shape[1]))
    sections, codes, start = [], [], 0
    for run in codec.runs:
        for _ in range(run.count):
            columns = slice(start, start + run.group)
            section = searched_section(remaining[:, columns], run.bits)
            order = torch.arange(run.group)
            grid = TensorSections(order, (section,))
            group_codes = feedback(
                remaining[:, columns], grid, CholeskyFactor([upper[columns, columns].double()], order, 0.12)
            )
            codes.append(group_codes)
            sections.append(section)
            spread_errors(remaining, grid.values(group_codes), upper, columns)
            start = columns.stop
    return joined(codec, cholesky, sections), torch.cat(codes, dim=1)[:, cholesky.order.argsort()]


def spread_errors(remaining: Tensor, values: Tensor, upper: Tensor, columns: slice) -> None:
    """Spreads the errors of a solved group over the columns after it, as error feedback column by column would.

    With d = W - Q of the group and U the group's part of the Cholesky factor, the scaled errors E solve E U = d.
    """
    errors = torch.linalg.solve_triangular(
        upper[columns, columns], remaining[:, columns] - values, upper=True, left=False
    )
    remaining[:, columns.stop :] -= errors @ upper[columns, columns.stop :]


def joined(codec: Exl2, cholesky: CholeskyFactor, groups: list[SquaredSection]) -> TensorSections:
    """Joins the groups of each run to one section."""
    sections, start = [], 0
    for run in codec.runs:
        members = groups[start : start + run.count]
        maxima, subs = (
            torch.cat([group.maxima for group in members]),
            torch.cat([group.subs for group in members], dim=1),
        )
        sections.append(replace(members[0], maxima=maxima, subs=subs))
        start += run.count
    return TensorSections(cholesky.order, tuple(sections))


class Baseline:
    """A model whose linears ExLlamaV2's recipe has quantized. Its other tensors are those of `export`."""

    def __init__(self, export: Export, linears: dict[str, StoredTensor]) -> None:
        self._export, self._linears, self.config = export, linears, export.config

    def names(self) -> list[str]:
        return self._export.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._export.shape(name)

    def read(self, name: str) -> Tensor:
        if name not in self._linears:
            return self._export.read(name)
        tensor = self._linears[name]
        return torch.from_numpy(Exl2(runs_named(tensor.codec_name)).decode(tensor.planes, tensor.shape[1]))


def baselines(source: Source, tokens: Tensor, choices: dict[Choice, Codecs]) -> dict[Choice, dict[str, StoredTensor]]:
    """Quantizes every linear by ExLlamaV2's recipe, in the codecs of each choice. One pass collects plain second
    moments for all choices."""
    model, linears = BlockModel(source), {choice: {} for choice in choices}
    blocks = forward_moments(model, tokens, "plain", wanted=lambda *_: True, last=len(model) - 1)
    for block in blocks:
        for name, hessian in by_weight(model, block).items():
            weight = source.read(name).float()
            for choice, codecs in choices.items():
                codec = Exl2(runs_named(codecs[name]))
                grid, codes = converted(codec, weight, hessian)
                planes = codec.encode(grid.numpy(), codes.numpy())
                linears[choice][name] = StoredTensor(name, codec.name, tuple(weight.shape), planes)
    return linears


class Size:
    """One size: lqexport's folder, and the codecs that ExLlamaV2's recipe is given for this size.

    The second moments and the losses of mixes are computed once for all sizes.
    """

    def __init__(self, source: Source, recipe: Recipe, work: Path) -> None:
        assert recipe.bits is not None
        artifact, folder = work / f"{recipe.bits:g}", work / f"{recipe.bits:g}-exl2"
        report = quantize(recipe, artifact, cache=work / "moments")
        if not folder.is_dir():
            exl2.write(Artifact(artifact), folder)
        self.bits, self.spent, self.export = recipe.bits, report["linears_bits_per_weight"], open_export(folder)
        shapes = {name: source.shape(name) for name in source.names()}
        even = plan_exl2(source.config, shapes, bits=recipe.bits, head_bits=recipe.head_bits)
        self.choices: dict[str, Codecs] = {
            "ExLlamaV2's recipe, same widths": {tensor["name"]: tensor["codec"] for tensor in report["tensors"]},
            "ExLlamaV2's recipe, even widths": {tensor.name: tensor.codec_name for tensor in even},
        }


def gguf_file(recipe: Recipe, work: Path) -> tuple[float, Path]:
    """Returns the bits per weight of the linears and the file of a GGUF recipe with the same second moments."""
    tensor_type = recipe.target.removeprefix("gguf:")
    artifact, file = work / tensor_type, work / f"{tensor_type}.gguf"
    quantize(recipe, artifact, cache=work / "moments")
    if not file.is_file():
        gguf.write(Artifact(artifact), file)
    linears = [tensor for tensor in Artifact(artifact).report()["tensors"] if "relative_error" in tensor]
    return 8 * sum(tensor["bytes"] for tensor in linears) / sum(np.prod(tensor["shape"]) for tensor in linears), file


class Table:
    """Table rows by rising size. Each is also printed to stderr as soon as it is known."""

    def __init__(self) -> None:
        self._rows: list[tuple[float, str]] = []

    def add(self, bits: float, label: str, size: float, result: evaluate.Evaluation) -> None:
        figures = f"{result.kl:.4f} ± {result.kl_error:.4f} | {result.perplexity:.2f} | {result.top1:.1%}"
        self._rows.append((bits, f"| {bits:g} | {label} | {size:.3f} | {figures} |"))
        print(self._rows[-1][1], file=sys.stderr, flush=True)

    def __str__(self) -> str:
        head = "| bits | method | bits of the linears | mean KL | perplexity | same top-1 |\n|---|---|---|---|---|---|"
        return "\n".join([head, *(text for _, text in sorted(self._rows, key=lambda row: row[0]))])


def main() -> None:
    parser = comparison_parser(__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--bits", type=float, nargs="+", default=[2.5, 3.0, 4.0])
    parser.add_argument("--gguf", nargs="*", default=[])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--moments", default="guided")
    parser.add_argument("--prefix", choices=["full", "quantized"])
    parser.add_argument("--tune", type=int, default=0)
    parser.add_argument("--compute-dtype", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    source = open_source(arguments.model)
    judged = Judge(source, arguments.evaluation, arguments.windows)
    tokens = load_calibration(arguments.calibration, source.tokenizer(), samples=arguments.samples,
                              sequence_length=512, seed=0).tokens  # fmt: skip
    table = Table()
    with torch.no_grad():
        base_recipe = Recipe(
            arguments.model, "exl2", bits=4, calibration=arguments.calibration, samples=arguments.samples,
            moments=arguments.moments, prefix=arguments.prefix, tune=arguments.tune,
            compute_dtype=arguments.compute_dtype,
        )  # fmt: skip
        sizes = [Size(source, replace(base_recipe, bits=bits), arguments.work) for bits in arguments.bits]
        for size in sizes:
            table.add(size.bits, "lqexport", size.spent, judged(size.export))
        exports = {size.bits: size.export for size in sizes}
        choices = {(size.bits, label): codecs for size in sizes for label, codecs in size.choices.items()}
        for (bits, label), linears in baselines(source, tokens, choices).items():
            spent = 8 * sum(plane.nbytes for tensor in linears.values() for plane in tensor.planes.values())
            weights = sum(np.prod(tensor.shape) for tensor in linears.values())
            table.add(bits, label, spent / weights, judged(Baseline(exports[bits], linears)))
        for tensor_type in arguments.gguf:
            spent, file = gguf_file(replace(base_recipe, target=f"gguf:{tensor_type}", bits=None), arguments.work)
            table.add(spent, f"GGUF {tensor_type}", spent, judged(GGUFSource(file)))
    print(table)


if __name__ == "__main__":
    main()
