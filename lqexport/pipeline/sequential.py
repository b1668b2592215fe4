"""Second moments for `prefix = "quantized"`: each linear sees the inputs that the quantized ones before it give, in the
order in which data flows (true-sequential, as GPTQ and LeanQuant). With asymmetric calibration the full-precision model
runs beside, and says what each linear should aim at (`lqexport.calibration.asymmetric`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, islice, repeat
from typing import Any

import torch
from torch import Tensor, nn

from lqexport.calibration.asymmetric import CrossMoments, Entering
from lqexport.calibration.collect import input_of, sharded, to_the_end
from lqexport.calibration.moments import Group, SecondMoments
from lqexport.models.blocks import BlockModel, linear_of
from lqexport.pipeline.job import Job
from lqexport.runtime.tiles import dealt
from lqexport.solver.corrected_linear import stored_correction
from lqexport.solver.linear import check_finite, rows_are_apart
from lqexport.storage.artifact import values_of


@dataclass(frozen=True)
class Problem:
    """A linear to solve: the weights [R, C] to come near to, float, and its second moments, float32 [C, C].

    rows    those that this process is to solve, where others solve the rest; None for all
    share   of all that the processes solve at the same time, what this one does
    """

    name: str
    weight: Tensor
    hessian: Tensor
    rows: slice | None
    share: float
    facts: dict[str, Any] = field(default_factory=dict)


class Sequential:
    """A job's problems, by groups of linears with the same inputs. Whoever takes a group's hands their solutions to the
    artifact before asking for the next group. `begin` is called when the first is about to be made: a pass with
    progress of its own may come before.

    Several processes share the passes, shard by shard, and each has problems of its own of every group, or none."""

    def __init__(self, job: Job, model: BlockModel, begin: Callable[[], None]) -> None:
        self.job, self.model, self.recipe, self.processes = job, model, job.recipe, job.processes
        self.weights = job.token_weights(model) if job.kind == "guided" else {}
        begin()
        shards = sharded(job.sequences)
        self.rounds = list(self.processes.rounds(len(shards)))
        numbered = list(enumerate(batch for shard in shards for batch in shard))
        ends = list(accumulate(map(len, shards), initial=0))
        self.shards = [numbered[ends[i] : ends[i + 1]] for i in self.processes.mine(range(len(shards)))]
        self.keep = job.placement.hidden.keep
        self.inputs = {number: self.keep(model.start(ids)) for shard in self.shards for number, ids in shard}
        self.full = dict(self.inputs)
        model.let_go()
        self.lengths = [ids.numel() for _, ids in numbered]
        # A block adds to its input what attention gives, and to that what its output is made of.
        self.first, self.last = model.architecture.adders

    def groups(self) -> Iterator[Iterator[Problem]]:
        """Of the unfinished linears alone."""
        originals = (block for _, block in self.model.blocks()) if self.recipe.asymmetric else repeat(None)
        # What `blocks` gave before is gone when the next is loaded.
        for (index, block), original in islice(zip(self.model.blocks(), originals, strict=False), self._blocks()):
            self.model.expect(index + 1)
            for group in self.model.architecture.linears_of(index):
                if names := self.processes.agreed(self.job.unfinished(self.model, index, group)):
                    yield self._group(group, names, block, original)
                    self.job.artifact.settle()
                    self.processes.wait()
                for linear in group:
                    self._carry_forward(linear_of(block, linear), self.model.weight_name(index, linear))
            self._run_through(block, self.inputs)
            if original is not None:
                self._run_through(original, self.full)

    def _blocks(self) -> int:
        """How many there are up to the last with something to solve."""
        groups = self.model.architecture.linears_of
        unfinished = (i + 1 for i in range(len(self.model)) for g in groups(i) if self.job.unfinished(self.model, i, g))
        return self.processes.agreed(max(unfinished, default=0))

    def _run_through(self, block: nn.Module, states: dict[int, Tensor]) -> None:
        for number, batch in states.items():
            states[number] = self.keep(self.model.run(block, batch.to(self.model.device)))

    def _group(self, group: Group, names: list[str], block: nn.Module, original: nn.Module | None) -> Iterator[Problem]:
        """This process's share of a group's linears that are named."""
        mine, share = self._dealt(names)
        if original is None:
            hessian = self._moments(group, block)
            for name, rows in mine:
                yield Problem(name, self.job.source.read(name), hessian, rows, share)
            return
        cross = self._cross_moments(group, names, block, original)
        for name, rows in mine:
            weight = self.job.source.read(name).to(self.job.device).float()
            check_finite(name, weight)
            # By all processes that solve a part of it: the strength is of all rows.
            target, strength = cross[name].target(weight, self.recipe.dampening)
            yield Problem(name, target, cross[name].hessian(), rows, share, {"asymmetric_strength": strength})

    def _dealt(self, names: list[str]) -> tuple[list[tuple[str, slice | None]], float]:
        """What this process gets of these linears, whole ones or some rows, and its share of all their weights."""
        linears = [self.job.linears[name] for name in names]
        whole = [bool(self.recipe.rank) or not rows_are_apart(linear.codec_name) for linear in linears]
        rows = [1 if alone else linear.matrix[0] for linear, alone in zip(linears, whole, strict=True)]
        mine = dealt(rows, self.processes.count)[self.processes.rank]
        weights = sum(linears[i].weights * (run.stop - run.start) / rows[i] for i, run in mine)
        parts = [(names[i], None if run == slice(0, rows[i]) else run) for i, run in mine]
        return parts, weights / sum(linear.weights for linear in linears)

    def _moments(self, group: Group, block: nn.Module) -> Tensor:
        columns, keep = linear_of(block, group[0]).in_features, self.job.placement.moments.keep
        moments = SecondMoments(columns, self.job.kind, self.job.device, keep=keep)
        for turn, (shard, senders) in enumerate(self.rounds):
            for number, _ in self.shards[turn] if shard is not None else ():
                moments.add(input_of(self.model, block, group[0], self.inputs[number]))
            moments.end_shard(self.processes, 0, senders)
        if self.processes.count == 1:
            return moments.hessian()
        # Over NCCL it has to be on the device.
        own = moments.hessian().to(self.job.device) if self.processes.first else None
        return self.processes.given(torch.empty(columns, columns, device=self.job.device) if own is None else own)

    def _cross_moments(
        self, group: Group, names: list[str], block: nn.Module, original: nn.Module
    ) -> dict[str, CrossMoments]:
        """By name; guided, each linear weighs the tokens in its own way."""
        linear = linear_of(block, group[0])
        rows = linear.out_features if group[0] in (self.first, self.last) else 0
        apart = names if self.weights else names[:1]
        found = {name: CrossMoments(linear.in_features, self.job.kind, self.job.placement, rows) for name in apart}
        parts = {name: self.weights[name].split(self.lengths) for name in apart} if self.weights else {}
        for turn, (shard, senders) in enumerate(self.rounds):
            for number, _ in self.shards[turn] if shard is not None else ():
                there = self._enters(group[0], original, self.full[number])
                here = self._enters(group[0], block, self.inputs[number])
                for name, cross in found.items():
                    cross.add(number % 2, there, here, parts[name][number] if parts else None)
            for cross in found.values():
                cross.end_shard(self.processes, senders)
        for cross in found.values():
            cross.share(self.processes)
        return found if self.weights else dict.fromkeys(names, found[names[0]])

    def _enters(self, linear: str, block: nn.Module, hidden: Tensor) -> Entering:
        """What enters a linear when the block runs on `hidden`."""
        if linear == self.last:
            return Entering(*to_the_end(self.model, block, linear, hidden))
        inputs = input_of(self.model, block, linear, hidden)
        return Entering(inputs, hidden.to(inputs.device) if linear == self.first else None)

    def _carry_forward(self, linear: nn.Linear, name: str) -> None:
        """Go on with the weights as the file decodes them."""
        values, correction = values_of(self.job.artifact.read(name)), stored_correction(self.job.artifact, name)
        linear.weight.data = (values if correction is None else values + correction).to(linear.weight)
