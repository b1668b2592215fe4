"""Solving every linear of a job under the second moments of its inputs.

Inputs come from the full-precision blocks before (`prefix = "full"`: linears are independent of each other, see
`lqexport.collect`), or from the quantized ones, linears in the order in which data flows (`prefix = "quantized"`:
true-sequential, as GPTQ and LeanQuant). A finished linear is never solved again: a resumed run repeats the passes,
which give the same bits, and reads what is done. Several processes solve different linears.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lqexport.artifact import StoredTensor
from lqexport.asymmetric import CrossMoments
from lqexport.blocks import BlockModel
from lqexport.collect import (
    Group,
    add_outputs,
    begin_with_first,
    by_weight,
    embed,
    input_magnitudes,
    input_of,
    linear_of,
    run_through,
)
from lqexport.converters.plan import PlannedTensor
from lqexport.converters.tensor_names import is_tied
from lqexport.corrected import solve_corrected, stored_correction, values_of
from lqexport.job import Job
from lqexport.linear import solve_linear
from lqexport.moments import SecondMoments


def solve(job: Job) -> None:
    """Solve, pack and write the linears that are not in the artifact yet."""
    _Solving(job).run()


class _Solving:
    def __init__(self, job: Job) -> None:
        self.job, self.recipe, self.artifact, self.device = job, job.recipe, job.artifact, job.device
        self.processes = job.processes
        self.magnitudes: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}

    def run(self) -> None:
        unfinished = self.processes.agreed([name for name in self.job.linears if name not in self.artifact])
        if self.job.calibration is None:
            self._begin_solving()
            for name in self.processes.mine(unfinished):
                self._solve(self.job.linears[name], self.job.source.read(name), None)
        elif unfinished:
            model = self.job.model()
            if self.recipe.rank and self.recipe.scaling == "l2qer":
                self.magnitudes = input_magnitudes(model, self.job.sequences, self.processes)
            step = self._solve_on_quantized if self.recipe.prefix == "quantized" else self._solve_on_full
            step(model)
        if self.job.head and self.processes.agreed(self.job.head.name not in self.artifact):
            self._solve_head(self.job.head)

    def _solve_head(self, head: PlannedTensor) -> None:
        """The output, on inputs from the full-precision model."""
        kind = "normalized" if self.recipe.moments == "guided" else self.recipe.moments
        moments = SecondMoments(head.matrix[1], kind, self.device, keep=self.job.room.moments.keep)
        if calibrated := self.job.calibration is not None:
            add_outputs(moments, self.job.model(), self.job.sequences, self.processes)
        if self.processes.first:
            own = head.name in self.job.source.names() and not is_tied(self.job.source.config)
            weight = self.job.source.read(head.name if own else self.job.architecture.embedding)
            self._solve(head, weight, moments.hessian() if calibrated else None)

    def _begin_solving(self) -> None:
        weights = {name: tensor.weights for name, tensor in self.job.linears.items()}
        self.job.listener.stage("Quantizing", sum(weights.values()))
        self.job.listener.advance(sum(weights[name] for name in weights if name in self.artifact))

    def _solve_on_full(self, model: BlockModel) -> None:
        """Every linear on inputs from the full-precision blocks before."""
        for block in begin_with_first(self.job.moments(model), self._begin_solving):
            for name, hessian in by_weight(model, block).items():
                if self.job.is_unfinished(name):
                    self._solve(self.job.linears[name], self.job.source.read(name), hessian)

    def _solve_on_quantized(self, model: BlockModel) -> None:
        """Block by block on inputs from the quantized blocks before; within a block, group by group."""
        self.weights = self.job.token_weights(model) if self.recipe.moments == "guided" else {}
        self._begin_solving()
        inputs = embed(model, self.job.sequences)
        full = list(inputs) if self.recipe.asymmetric else None
        last = max(i for i in range(len(model)) for g in model.architecture.linears if self.job.unfinished(model, i, g))
        for index, block in model.blocks():
            if index > last:
                return
            original = model.block(index) if full else None
            for group in model.architecture.linears:
                if names := self.job.unfinished(model, index, group):
                    moments = self._group_moments(model, block, group, names, inputs, original, full)
                    for name in names:
                        self._solve_on(name, moments[name])
                for linear in group:
                    self._carry_forward(linear_of(block, linear), model.weight_name(index, linear))
            run_through(model, block, inputs)
            if original and full:
                run_through(model, original, full)

    def _group_moments(
        self, model: BlockModel, block: nn.Module, group: Group, names: list[str], inputs: list[Tensor],
        original: nn.Module | None, full: list[Tensor] | None,
    ) -> Mapping[str, SecondMoments | CrossMoments]:  # fmt: skip
        """Second moments of a group's inputs, for the weights that are named; with the full-precision block and its
        inputs, cross moments."""
        columns = linear_of(block, group[0]).in_features
        if original is None or full is None:
            moments = SecondMoments(columns, self.recipe.moments, self.device, keep=self.job.room.moments.keep)
            for batch in inputs:
                moments.add(input_of(model, block, group[0], batch))
            return dict.fromkeys(names, moments)
        # Guided, each linear weighs the tokens in its own way.
        apart = names if self.weights else names[:1]
        own = {name: CrossMoments(columns, self.recipe.moments, self.device) for name in apart}
        lengths = [batch.shape[0] * batch.shape[1] for batch in inputs]
        parts = {name: self.weights[name].split(lengths) for name in own} if self.weights else {}
        for i, (batch, exact) in enumerate(zip(inputs, full, strict=True)):
            pair = input_of(model, original, group[0], exact), input_of(model, block, group[0], batch)
            for name, cross in own.items():
                cross.add(i % 2, *pair, parts[name][i] if parts else None)
        return own if self.weights else dict.fromkeys(names, own[names[0]])

    def _solve_on(self, name: str, moments: SecondMoments | CrossMoments) -> None:
        weight, tensor = self.job.source.read(name), self.job.linears[name]
        if isinstance(moments, CrossMoments):
            target, strength = moments.target(weight.to(self.device).float(), self.recipe.dampening)
            self._solve(tensor, target, moments.hessian(), {"asymmetric_strength": strength})
        else:
            self._solve(tensor, weight, moments.hessian())

    def _solve(
        self, tensor: PlannedTensor, weight: Tensor, hessian: Tensor | None, facts: dict[str, Any] | None = None
    ) -> None:
        name, began = tensor.name, time.perf_counter()
        *factors, solved = self._solved(name, weight, hessian, tensor.codec)
        solved.facts.update(facts or {})
        for stored in (*factors, solved):  # the linear comes last: where it is, its factors are
            self.artifact.write(stored)
        self.artifact.log({"name": name, "seconds": round(time.perf_counter() - began, 3), **solved.facts})
        self.job.listener.advance(tensor.weights * self.processes.count)  # the others do as much meanwhile

    def _solved(self, name: str, weight: Tensor, hessian: Tensor | None, kind: str) -> list[StoredTensor]:
        recipe = self.job.recipe_of(name)
        if hessian is None or not recipe.rank or name not in self.job.linears:
            return [solve_linear(name, weight, hessian, kind, recipe, self.job.room)]
        hessian = hessian.to(self.device)
        return solve_corrected(name, weight.to(self.device).float(), hessian, self.magnitudes.get(name), kind, recipe)

    def _carry_forward(self, linear: nn.Linear, name: str) -> None:
        """Go on with the weights as the file decodes them."""
        values, correction = values_of(self.artifact.read(name)), stored_correction(self.artifact, name)
        linear.weight.data = (values if correction is None else values + correction).to(linear.weight)
