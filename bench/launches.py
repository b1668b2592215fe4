"""Counts the launches and operations of one decoder block of a default run on a GPU, without a GPU and without weights.

    python bench/launches.py tests/configs/llama-3.1-8b.json [--target gguf:Q4_K] [--samples 64]

The block runs with tensors that have shapes and no data. Every operation of torch that is no view counts as one launch,
and so does every CUDA kernel of the solver. A wait is a number that Python reads from the device. What packs codes on
the host is left out. Operations are those of `lqexport plan`, for the mean block. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lqexport.calibration.asymmetric import CrossMoments, Entering
from lqexport.calibration.collect import batches, sharded
from lqexport.formats.registry import codec_named
from lqexport.grids import fit
from lqexport.kernels import cuda_solve
from lqexport.models.blocks import BlockModel, linear_of
from lqexport.planning.cost import Work, operations_estimate
from lqexport.planning.forecast import ConfigModel, forecast
from lqexport.recipe import Recipe
from lqexport.runtime import products
from lqexport.runtime.placement import all_on_device
from lqexport.solver import feedback, linear, solve_cuda

ALLOCATIONS = ("empty", "empty_like", "empty_strided", "detach", "lift_fresh", "_unsafe_view")
"""Operations that launch nothing and are no views by their schema."""
DAMPENING = 0.01
"""Stands in for the default, which picks the median of the used columns: tensors without data cannot say which."""


class Launches(TorchDispatchMode):
    """Counts launches and waits by stage."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()
        self.stage = ""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "equal"):
            self.counts[self.stage, "waits"] += 1
            return 1.0 if name != "equal" else True
        is_view = any(each.alias_info and not each.alias_info.is_write for each in function._schema.returns)
        is_kernel = function.namespace == "aten" and not is_view and name not in ALLOCATIONS
        self.counts[self.stage, "launches"] += is_kernel
        return function(*arguments, **(named or {}))

    def kernel(self, *results: Tensor) -> Any:
        """Counts a kernel of the solver, and returns its results."""
        self.counts[self.stage, "launches"] += 1
        return results


class NoWeights(ConfigModel):
    """The weights of a model as tensors without data."""

    def read(self, name: str) -> Tensor:
        return torch.empty(self.shape(name), dtype=torch.bfloat16)


@contextlib.contextmanager
def kernels_counted(launches: Launches) -> Iterator[None]:
    """Puts counters in the place of the solver's CUDA kernels."""

    def feedback_block(weights: Tensor, *_: Any) -> Any:
        return launches.kernel(torch.empty_like(weights, dtype=torch.uint8), torch.empty_like(weights))

    def refine_block(*_: Any) -> None:
        launches.kernel()

    def fit_groups(weights: Tensor, importance: Tensor, *_: Any) -> Any:
        return launches.kernel(*torch.empty(2, len(weights), len(importance)))

    with (
        mock.patch.object(cuda_solve, "feedback_block", feedback_block),
        mock.patch.object(cuda_solve, "refine_block", refine_block),
        mock.patch.object(cuda_solve, "fit_groups", fit_groups),
        mock.patch.object(fit, "_fit_cpu", fit._fit_cuda),
        mock.patch.object(feedback, "backend", return_value=solve_cuda),
        mock.patch.object(products, "has_fast_products", return_value=False),
    ):
        yield


def count(work: Work) -> Launches:
    """Returns the launches of the first block of a run with asymmetric calibration."""
    launches = Launches()
    with torch.no_grad(), kernels_counted(launches), FakeTensorMode(allow_non_fake_inputs=True), launches:
        _run(work, launches)
    return launches


def _run(work: Work, launches: Launches) -> None:
    recipe, weights = work.recipe, NoWeights(work.config)
    model = BlockModel(weights, compute_dtype=torch.bfloat16)
    tokens = torch.zeros(recipe.samples, recipe.sequence_length, dtype=torch.int64)
    all_batches = batches(tokens)
    with mock.patch.object(BlockModel, "_check_ids", return_value=None):
        hidden = model.start(all_batches[0])
    block, codec = model.block(0), codec_named(work.block[0].codec_name)
    launches.stage = "a pass of one batch"
    model.run(block, hidden)
    placement = all_on_device(torch.device("cpu"))
    for group in model.architecture.linears_of(0):
        first = linear_of(block, group[0])
        adds = group[0] in model.architecture.adders
        launches.stage = "moments"
        cross = CrossMoments(first.in_features, "normalized", placement, first.out_features * adds)
        states = torch.empty(*hidden.shape[:2], first.out_features) if adds else None
        entering = Entering(torch.empty(*hidden.shape[:2], first.in_features, dtype=torch.bfloat16), states)
        for number, shard in enumerate(sharded(tokens)):
            for _ in shard:
                cross.add(number % 2, entering, entering)
            cross.end_shard()
        hessian = cross.hessian()
        launches.stage = "factors"
        cholesky = linear.factorize(hessian, DAMPENING, True)
        for name in group:
            matrix = torch.empty(linear_of(block, name).weight.shape)
            launches.stage = "targets"
            cross.target(matrix, cholesky)
            solve(matrix, hessian, cholesky, codec, recipe.sweeps, launches)


def solve(matrix: Tensor, hessian: Tensor, cholesky: Any, codec: Any, sweeps: int, launches: Launches) -> None:
    """Counts the launches that solve one linear."""
    launches.stage = "fit"
    grid = fit.fit(codec, matrix, torch.empty(matrix.shape[1]))
    launches.stage = "feedback"
    codes = feedback.feedback(matrix, grid, cholesky)
    launches.stage = "descent"
    feedback.refine(matrix, hessian, grid, codes, sweeps=sweeps, refit=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--target", default="gguf:Q4_K")
    parser.add_argument("--samples", type=int, default=64)
    arguments = parser.parse_args()
    recipe = Recipe(str(arguments.config), arguments.target, samples=arguments.samples)
    work = forecast(arguments.config, recipe, "1TB", "1TB").work
    launches = count(work)
    passes = 2 * len(batches(torch.zeros(recipe.samples, recipe.sequence_length)))
    operations = operations_estimate(work)
    per_block = {
        "passes": operations.passes, "moments": operations.moments, "factors": operations.factors,
        "targets": operations.targets, "feedback and descent": operations.solver,
    }  # fmt: skip
    print("| stage | launches | waits |\n|---|---|---|")
    for stage in dict.fromkeys(stage for stage, _ in launches.counts if stage):
        times = passes if stage == "a pass of one batch" else 1
        name = f"passes, {passes} of one batch" if times > 1 else stage
        print(f"| {name} | {times * launches.counts[stage, 'launches']} | {times * launches.counts[stage, 'waits']} |")
    print("\n| stage | operations of a block |\n|---|---|")
    for stage, each in per_block.items():
        print(f"| {stage} | {each / work.blocks:.2g} |")


if __name__ == "__main__":
    main()
