"""Compares methods for an encoder in tables of 4, 3 and 2 bits: rounding, one order for all rows, an order per row.

    python bench/encoders.py MODEL --calibration FILE --evaluation FILE
        [--bits 4 3 2] [--samples 128] [--sentences 500] [--widest 0]

Guided second moments (of the embedding) are collected once, from the full-precision prefix. Every method then solves
all linears with lqexport's own functions. With `--widest N`, the exact method also solves matrices of more than N
columns in one order for all rows. The embeddings of sentences of the evaluation text are compared with the source's
(`lqexport.evaluation.embeddings`). The output error is the loss of all linears divided by the energy of their outputs.
The seconds are CPU time for finding the codes. Prints Markdown, line by line.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import comparison_parser
from torch import Tensor

from lqexport.calibration.collect import by_weight
from lqexport.calibration.guided import guided_moments
from lqexport.calibration.sequences import load_calibration
from lqexport.calibration.texts import read_text
from lqexport.evaluation.embeddings import embeddings, sentences, similarity, token_ids
from lqexport.formats.registry import codec_named
from lqexport.grids.fit import fit, minmax
from lqexport.grids.grid import TensorGrid
from lqexport.models.blocks import BlockModel
from lqexport.models.source import Source, open_source
from lqexport.recipe import Recipe
from lqexport.runtime.progress import Silent
from lqexport.solver.cholesky import CholeskyFactor, factorize
from lqexport.solver.feedback import damped, feedback, layer_loss, refine
from lqexport.solver.solve_exact import in_own_order

COLUMNS = ("bits", "method", "output error", "mean cosine", "least", "of the 10 nearest, the same", "same nearest")
COLUMNS += ("Kendall's tau", "CPU s")
Solver = Callable[[Tensor, TensorGrid, CholeskyFactor], Tensor]


@dataclass(frozen=True)
class Changed:
    """The source with some weights replaced: a `lqexport.models.interface.Weights`."""

    source: Source
    values: dict[str, Tensor]

    @property
    def config(self) -> dict[str, Any]:
        return self.source.config

    def names(self) -> list[str]:
        return self.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(name)

    def read(self, name: str) -> Tensor:
        return self.values[name] if name in self.values else self.source.read(name)


@dataclass
class Bench:
    """The model and the sentences that every method is judged on.

    weights    [R, C] of every linear
    moments    the Hessian [C, C] of every linear
    ids        the token ids of every sentence
    reference  the source's embeddings of the sentences
    """

    source: Source
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    ids: list[list[int]]
    reference: Tensor

    def tell(self, bits: int, method: str, values: dict[str, Tensor], seconds: float) -> None:
        """Judges a method's weights and prints a table row."""
        errors = [layer_loss(values[name] - weight, self.moments[name]) for name, weight in self.weights.items()]
        energies = [layer_loss(weight, self.moments[name]) for name, weight in self.weights.items()]
        model = BlockModel(Changed(self.source, values))
        likeness = similarity(self.reference, embeddings(model, self.ids, Silent(), ""))
        cells = [str(bits), method, f"{sum(errors) / sum(energies):.4f}"]
        cells += [f"{likeness.cosine:.4f} ± {likeness.cosine_error:.4f}", f"{likeness.cosine_least:.3f}"]
        cells += [f"{likeness.recall:.3f} ± {likeness.recall_error:.3f}", f"{likeness.top1:.1%}"]
        cells += [f"{likeness.kendall:.3f}", f"{seconds:.0f}"]
        print(f"| {' | '.join(cells)} |", flush=True)

    def rounded(self, bits: int) -> None:
        """Rounds weights to the nearest value of the evenly spaced table, and of the loss-error-aware table."""
        codec = codec_named(f"native:table-{bits}")
        plain, aware = {}, {}
        for name, weight in self.weights.items():
            even, fitted = minmax(codec, weight), fit(codec, weight, self.moments[name].diagonal())
            plain[name], aware[name] = even.values(even.nearest(weight)), fitted.values(fitted.nearest(weight))
        self.tell(bits, "RTN, even table", plain, 0)
        self.tell(bits, "rounded to the fitted table", aware, 0)

    def solved(self, bits: int, method: str, solver: Solver) -> None:
        """Solves all linears by `solver` alone, and then with descent."""
        recipe, alone, refined, seconds = Recipe("", f"native:table-{bits}"), {}, {}, 0.0
        for name, weight in self.weights.items():
            hessian = self.moments[name]
            cholesky = factorize(hessian, recipe.dampening, recipe.act_order)
            grid = fit(codec_named(recipe.target), weight, hessian.diagonal())
            began = time.process_time()
            codes = solver(weight, grid, cholesky)
            seconds += time.process_time() - began
            alone[name] = grid.values(codes)
            moved, codes = refine(
                weight, damped(hessian, cholesky.dampening), grid, codes, sweeps=recipe.sweeps, refit=True
            )
            refined[name] = moved.values(codes)
        self.tell(bits, f"{method}, one pass", alone, seconds)
        self.tell(bits, f"{method}, with descent", refined, seconds)


def gathered(source: Source, tokens: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yields every weight's name and its guided second moments."""
    model = BlockModel(source)
    with tempfile.TemporaryDirectory() as folder:
        for block in guided_moments(model, tokens, output_groups=1, folder=Path(folder), listener=Silent()):
            yield from by_weight(model, block).items()


def made(arguments: argparse.Namespace) -> Bench:
    """Collects the second moments and the source's embeddings."""
    source = open_source(arguments.model)
    tokenizer = source.tokenizer()
    tokens = load_calibration(
        arguments.calibration, tokenizer, samples=arguments.samples, sequence_length=128, seed=0, encoder=True
    ).tokens
    moments = dict(gathered(source, tokens))
    chosen = sentences(read_text(arguments.evaluation).content, arguments.sentences)
    ids = token_ids(tokenizer, chosen, source.config["max_position_embeddings"])
    weights = {name: source.read(name).float() for name in moments}
    return Bench(source, weights, moments, ids, embeddings(BlockModel(source), ids, Silent(), ""))


def main() -> None:
    parser = comparison_parser(__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sentences", type=int, default=500)
    parser.add_argument("--widest", type=int, default=0, help="0: no limit")
    arguments = parser.parse_args()

    def narrow(weight: Tensor, grid: TensorGrid, cholesky: CholeskyFactor) -> Tensor:
        wide = arguments.widest and weight.shape[1] > arguments.widest
        return (feedback if wide else in_own_order)(weight, grid, cholesky)

    with torch.no_grad():
        bench = made(arguments)
        print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
        for bits in arguments.bits:
            bench.rounded(bits)
            bench.solved(bits, "one order for all rows", feedback)
            bench.solved(bits, f"exact{f' up to {arguments.widest} columns' if arguments.widest else ''}", narrow)


if __name__ == "__main__":
    main()
