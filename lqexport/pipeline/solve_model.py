"""Solving every linear of a job under the second moments of its inputs.

Inputs come from the full-precision blocks before (`prefix = "full"`: linears are independent of each other, see
`lqexport.calibration.collect`), or from the quantized ones (`prefix = "quantized"`, see `lqexport.pipeline.sequential`). A finished linear
is never solved again: a resumed run repeats the passes, which give the same bits, and reads what is done. Several
processes solve different linears.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from torch import Tensor

from lqexport.calibration.collect import add_outputs, begin_with_first, by_weight, input_magnitudes
from lqexport.calibration.moments import SecondMoments
from lqexport.converters.models.tensor_names import is_tied
from lqexport.converters.plan import PlannedTensor
from lqexport.models.blocks import BlockModel
from lqexport.pipeline.job import Job
from lqexport.pipeline.sequential import Problem, Sequential
from lqexport.recipe import Moments
from lqexport.solver.corrected_linear import solve_corrected
from lqexport.solver.linear import SolvedRows, assembled, solve_linear, solve_rows
from lqexport.storage.artifact import StoredTensor


def solve(job: Job) -> None:
    """Solve, pack and write the linears that are not in the artifact yet."""
    _Solving(job).run()


@dataclass(frozen=True)
class _Part:
    """Rows of a linear, from `start` on, that this process has solved."""

    name: str
    start: int
    rows: list[SolvedRows]
    facts: dict[str, Any]
    seconds: float


class _Solving:
    def __init__(self, job: Job) -> None:
        self.job, self.recipe, self.artifact, self.device = job, job.recipe, job.artifact, job.device
        self.processes = job.processes
        self.magnitudes: dict[str, Tensor] = {}

    def run(self) -> None:
        unfinished = self.processes.agreed([name for name in self.job.linears if name not in self.artifact])
        if self.job.calibration is None:
            self._begin_solving()
            for name in self.processes.mine(unfinished):
                self._solve(self.job.linears[name], self.job.source.read(name), None, 1 / self.processes.count)
        elif unfinished:
            model = self.job.model()
            if self.recipe.rank and self.recipe.scaling == "l2qer":
                self.magnitudes = input_magnitudes(model, self.job.sequences, self.processes)
            step = self._solve_on_quantized if self.recipe.prefix == "quantized" else self._solve_on_full
            step(model)
        self.artifact.settle()
        if self.job.head and self.processes.agreed(self.job.head.name not in self.artifact):
            self._solve_head(self.job.head)
            self.artifact.settle()

    def _solve_head(self, head: PlannedTensor) -> None:
        """The output, on inputs from the full-precision model."""
        kind: Moments = "normalized" if self.job.kind == "guided" else self.job.kind
        moments = SecondMoments(head.matrix[1], kind, self.device, keep=self.job.placement.moments.keep)
        if calibrated := self.job.calibration is not None:
            add_outputs(moments, self.job.model(), self.job.sequences, self.processes)
        if self.processes.first:
            own = head.name in self.job.source.names() and not is_tied(self.job.source.config)
            weight = self.job.source.read(head.name if own else self.job.architecture.embedding)
            self._solve(head, weight, moments.hessian() if calibrated else None, 1.0)

    def _begin_solving(self) -> None:
        weights = {name: tensor.weights for name, tensor in self.job.linears.items()}
        self.job.listener.stage("Quantizing", sum(weights.values()))
        self.job.listener.advance(sum(weights[name] for name in weights if name in self.artifact))

    def _solve_on_full(self, model: BlockModel) -> None:
        """Every linear on inputs from the full-precision blocks before."""
        for block in begin_with_first(self.job.moments(model), self._begin_solving):
            for name, hessian in by_weight(model, block).items():
                if self.job.is_unfinished(name):
                    self._solve(self.job.linears[name], self.job.source.read(name), hessian, 1 / self.processes.count)
            self.artifact.settle()  # a guided pass that is stopped then goes on below this block

    def _solve_on_quantized(self, model: BlockModel) -> None:
        """Block by block on inputs from the quantized blocks before; within a block, group by group."""
        for group in Sequential(self.job, model, self._begin_solving).groups():
            parts = []
            for problem in group:
                if problem.rows is None:
                    linear = self.job.linears[problem.name]
                    self._solve(linear, problem.weight, problem.hessian, problem.share, problem.facts)
                else:
                    parts.append(self._solve_part(problem, problem.rows))
            self._put_together(parts)

    def _solve_part(self, problem: Problem, rows: slice) -> _Part:
        name, began = problem.name, time.perf_counter()
        tensor, recipe = self.job.linears[name], self.job.recipe_of(name)
        solved = solve_rows(name, problem.weight[rows], problem.hessian, tensor.codec_name, recipe, self.job.placement)
        part = _Part(name, rows.start, list(solved), problem.facts, time.perf_counter() - began)
        self.job.listener.advance(round(tensor.matrix[1] * (rows.stop - rows.start) / problem.share))
        return part

    def _put_together(self, mine: list[_Part]) -> None:
        """Write the linears whose first rows are this process's, from all processes' parts."""
        found = [part for parts in self.processes.everyones(mine) for part in parts]
        for first in mine:
            if first.start == 0:
                parts = sorted((part for part in found if part.name == first.name), key=attrgetter("start"))
                rows = [run for part in parts for run in part.rows]
                solved = assembled(first.name, self.job.linears[first.name].codec_name, rows)
                self._write([replace(solved, facts=solved.facts | first.facts)], first.seconds)

    def _solve(
        self, tensor: PlannedTensor, weight: Tensor, hessian: Tensor | None, share: float,
        facts: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """`share` is that of this process in what all solve at the same time."""
        name, began = tensor.name, time.perf_counter()
        *factors, solved = self._solved(name, weight, hessian, tensor.codec_name)
        solved.facts.update(facts or {})
        self._write([*factors, solved], time.perf_counter() - began)
        self.job.listener.advance(round(tensor.weights / share))

    def _write(self, solved: list[StoredTensor], seconds: float) -> None:
        """The linear comes last: where it is, its factors are."""
        for stored in solved:
            self.artifact.write_behind(stored)
        self.artifact.log({"name": stored.name, "seconds": round(seconds, 3), **stored.facts})

    def _solved(self, name: str, weight: Tensor, hessian: Tensor | None, kind: str) -> list[StoredTensor]:
        recipe = self.job.recipe_of(name)
        if hessian is None or not recipe.rank or name not in self.job.linears:
            return [solve_linear(name, weight, hessian, kind, recipe, self.job.placement)]
        hessian = hessian.to(self.device)
        return solve_corrected(name, weight.to(self.device).float(), hessian, self.magnitudes.get(name), kind, recipe)
