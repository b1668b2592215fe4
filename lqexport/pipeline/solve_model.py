"""The stage that solves every linear of the model under the second moments of its inputs.

The inputs come from the full-precision blocks before (prefix full), and then linears are independent of each other
(`lqexport.calibration.collect`). Or they come from the quantized blocks before (prefix quantized, see
`lqexport.pipeline.sequential`). A finished linear is never solved again: a resumed run repeats the passes from the last
block whose inputs were kept, which gives the same bits, and reads the finished linears. Several processes solve
different linears.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from lqexport.calibration.collect import add_outputs, begin_with_first, by_weight
from lqexport.calibration.moments import SecondMoments
from lqexport.converters.models.tensor_names import is_tied
from lqexport.converters.plan import PlannedTensor
from lqexport.formats.registry import codec_named
from lqexport.grids.whole import fitted_whole
from lqexport.models.blocks import BlockModel
from lqexport.pipeline.input_sizes import input_sizes
from lqexport.pipeline.job import Job
from lqexport.pipeline.second_moments import block_moments
from lqexport.pipeline.sequential import Problem, Sequential
from lqexport.recipe import Moments
from lqexport.solver.cholesky import CholeskyFactor
from lqexport.solver.corrected_linear import solve_corrected
from lqexport.solver.linear import SolvedRows, assembled, factor_of, solve_linear, solve_rows
from lqexport.solver.weighted_linear import solve_weighted
from lqexport.storage.artifact import StoredTensor

LOOKED_UP = 0.1
"""What an embedding that is also the output costs as an embedding: this share of the mean of the diagonal of its second
moments as the output, for the squared error of its weights (docs/mlx.md)."""


def solve_model(job: Job) -> None:
    """Solves, packs and writes the linears that are not in the artifact yet, the output last.

    An output that is the embedding comes first, since the blocks are solved on what it gives.
    """
    if job.head_is_embedding:
        _finish_head(job)
        job.processes.wait()
    unfinished = job.processes.from_first([name for name in job.linears if name not in job.artifact])
    if job.calibration is None:
        _begin_solving(job)
        for name in job.processes.share_of(unfinished):
            _solve_alone(job, job.linears[name], job.source.read(name), share=1 / job.processes.count)
    elif unfinished:
        _solve_blocks(job)
    job.artifact.settle()
    if not job.head_is_embedding:
        _finish_head(job)


def _finish_head(job: Job) -> None:
    """Solves, packs and writes the output, if the solver works on it and it is not in the artifact yet."""
    if job.head and job.processes.from_first(job.head.name not in job.artifact):
        _solve_head(job, job.head)
        job.artifact.settle()


def _begin_solving(job: Job) -> None:
    """Tells the listener of the stage, and of the linears that an earlier run finished."""
    weights = {name: tensor.weights for name, tensor in job.linears.items()}
    job.listener.stage("Quantizing", sum(weights.values()))
    job.listener.advance(sum(weights[name] for name in weights if name in job.artifact))


def _solve_alone(job: Job, tensor: PlannedTensor, weight: Tensor, *, share: float) -> None:
    """Solves and writes a linear without calibration: under the importance matrix, if the recipe has one."""
    if job.imatrix is None:
        _solve(job, tensor, weight, None, share=share)
        return
    began, settings = time.perf_counter(), job.recipe_of(tensor.name).solver_settings
    means = job.imatrix.means(tensor.name, weight.shape[1])
    solved = solve_weighted(tensor.name, weight, means, tensor.codec_name, settings, job.placement)
    _write(job, [solved], time.perf_counter() - began)
    job.listener.advance(round(tensor.weights / share))


def _solve_blocks(job: Job) -> None:
    """Solves the linears of all decoder blocks with calibration."""
    model, magnitudes = job.model(), dict[str, Tensor]()
    if job.recipe.rank and job.recipe.scaling == "l2qer":
        magnitudes = input_sizes(job, "factors", job.sequences)
    if job.recipe.prefix == "quantized":
        _solve_on_quantized(job, model, magnitudes)
    else:
        _solve_on_full(job, model, magnitudes)


def _solve_on_full(job: Job, model: BlockModel, magnitudes: dict[str, Tensor]) -> None:
    """Solves every linear on inputs from the full-precision blocks before."""
    for block in begin_with_first(block_moments(job, model), lambda: _begin_solving(job)):
        unfinished = ((name, hessian) for name, hessian in by_weight(model, block).items() if job.is_unfinished(name))
        for _, linears in groupby(unfinished, key=lambda linear: id(linear[1])):
            _solve_sharing(job, linears, magnitudes)
        job.artifact.settle()  # a guided pass that is stopped then goes on below this block


def _solve_sharing(job: Job, linears: Iterable[tuple[str, Tensor]], magnitudes: dict[str, Tensor]) -> None:
    """Solves linears that have the same second moments, and so the same Cholesky factor."""
    cholesky = None
    for name, hessian in linears:
        if cholesky is None and hessian.ndim == 2:
            settings = job.recipe_of(name).solver_settings
            cholesky = factor_of(name, hessian.to(job.device), settings, job.placement, job.solved_together)
        _solve(
            job, job.linears[name], job.source.read(name), hessian, magnitudes.get(name),
            share=1 / job.processes.count, cholesky=cholesky,
        )  # fmt: skip


def _solve_on_quantized(job: Job, model: BlockModel, magnitudes: dict[str, Tensor]) -> None:
    """Solves block by block on inputs from the quantized blocks before; within a block, group by group."""
    for group in Sequential(job, model, lambda: _begin_solving(job)).groups():
        _write_assembled(job, _solve_group(job, group, magnitudes))


def _solve_group(job: Job, group: Iterable[Problem], magnitudes: dict[str, Tensor]) -> list[_Part]:
    """Solves and writes a group's linears. Returns the runs of rows of those that several processes share."""
    parts = []
    for problem in group:
        if problem.rows is None:
            _solve(
                job, job.linears[problem.name], problem.weight, problem.hessian, magnitudes.get(problem.name),
                share=problem.share, facts=problem.facts, cholesky=problem.cholesky,
            )  # fmt: skip
        else:
            parts.append(_solve_part(job, problem, problem.rows))
    return parts


def _solve_head(job: Job, head: PlannedTensor) -> None:
    """Solves the output, on inputs from the full-precision model."""
    moments_type: Moments = "normalized" if job.moments_type == "guided" else job.moments_type
    moments = SecondMoments(head.matrix[1], moments_type, job.device, keep=job.placement.moments.keep)
    if calibrated := job.calibration is not None:
        add_outputs(moments, job.model(), job.sequences, job.processes)
    if job.processes.first:
        has_own_weight = head.name in job.source.names() and not is_tied(job.source.config)
        weight = job.source.read(head.name if has_own_weight else job.architecture.embedding)
        if not calibrated:
            _solve_alone(job, head, weight, share=1.0)
            return
        hessian = moments.hessian()
        if job.head_is_embedding:
            hessian = hessian + LOOKED_UP * hessian.diagonal().mean() * torch.eye(len(hessian), device=hessian.device)
        _solve(job, head, weight, hessian, share=1.0)


@dataclass(frozen=True)
class _Part:
    """Rows of a linear that this process has solved, from row `start` on, and the seconds that took."""

    name: str
    start: int
    rows: list[SolvedRows]
    facts: dict[str, Any]
    seconds: float


def _solve_part(job: Job, problem: Problem, rows: slice) -> _Part:
    name, began = problem.name, time.perf_counter()
    tensor, settings = job.linears[name], job.recipe_of(name).solver_settings
    weight, codec_name = problem.weight[rows], tensor.codec_name
    whole = fitted_whole(codec_named(codec_name), problem.weight)
    solved = list(
        solve_rows(name, weight, problem.hessian, codec_name, settings, job.placement, problem.cholesky, whole)
    )
    part = _Part(name, rows.start, solved, problem.facts, time.perf_counter() - began)
    job.listener.advance(round(tensor.matrix[1] * (rows.stop - rows.start) / problem.share))
    return part


def _write_assembled(job: Job, own_parts: list[_Part]) -> None:
    """Writes the linears whose first rows this process has solved, put together from all processes' parts."""
    all_parts = [part for parts in job.processes.gathered(own_parts) for part in parts]
    for first in own_parts:
        if first.start == 0:
            parts = sorted((part for part in all_parts if part.name == first.name), key=attrgetter("start"))
            rows = [run for part in parts for run in part.rows]
            solved = assembled(first.name, job.linears[first.name].codec_name, rows)
            _write(job, [replace(solved, facts=solved.facts | first.facts)], first.seconds)


def _solve(
    job: Job, tensor: PlannedTensor, weight: Tensor, hessian: Tensor | None, magnitudes: Tensor | None = None, *,
    share: float, facts: dict[str, Any] | None = None, cholesky: CholeskyFactor | None = None,
) -> None:  # fmt: skip
    """Solves and writes one linear.

    magnitudes   of its inputs, which the scaling l2qer needs
    share        this process's share of what all processes solve at the same time, for the progress
    facts        more facts to store with the linear
    cholesky     as for `solve_linear`
    """
    began = time.perf_counter()
    *factors, solved = _solved(job, tensor, weight, hessian, magnitudes, cholesky)
    solved.facts.update(facts or {})
    _write(job, [*factors, solved], time.perf_counter() - began)
    job.listener.advance(round(tensor.weights / share))


def _solved(
    job: Job, tensor: PlannedTensor, weight: Tensor, hessian: Tensor | None, magnitudes: Tensor | None,
    cholesky: CholeskyFactor | None,
) -> list[StoredTensor]:  # fmt: skip
    """Returns the low-rank factors, if any, and then the linear."""
    name, recipe = tensor.name, job.recipe_of(tensor.name)
    settings = recipe.solver_settings
    if hessian is None or not recipe.rank or name not in job.linears:
        return [solve_linear(name, weight, hessian, tensor.codec_name, settings, job.placement, cholesky)]
    return solve_corrected(
        name, weight.to(job.device).float(), hessian.to(job.device), magnitudes, tensor.codec_name, settings,
        recipe.correction_settings, cholesky,
    )  # fmt: skip


def _write(job: Job, solved: list[StoredTensor], seconds: float) -> None:
    """Writes a linear's factors and then the linear: whoever finds the linear finds its factors."""
    for stored in solved:
        job.artifact.write_behind(stored)
    job.artifact.log({"name": stored.name, "seconds": round(seconds, 3), **stored.facts})
