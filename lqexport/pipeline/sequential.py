"""Problems of the quantized prefix: each linear is solved on the inputs that the quantized linears before it give.

Linears come in the order in which data flows (true-sequential, as GPTQ and LeanQuant do it). With asymmetric
calibration the full-precision model runs beside the quantized one, and says what each linear should aim at
(`lqexport.calibration.asymmetric`).
"""

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
from lqexport.pipeline.second_moments import token_weights
from lqexport.runtime.tiles import dealt
from lqexport.solver.corrected_linear import stored_correction
from lqexport.solver.linear import check_target, inputs_of, rows_are_apart
from lqexport.solver.weight_checks import check_weights
from lqexport.storage.artifact import values_of


@dataclass(frozen=True)
class Problem:
    """One linear to solve.

    weight    the weights to come near to, any float dtype [R, C]
    hessian   second moments of its inputs, float32 [C, C]
    rows      the rows that this process solves while others solve the rest; None for all rows
    share     this process's share of all weights that the processes solve at the same time
    facts     what to store with the solved linear
    """

    name: str
    weight: Tensor
    hessian: Tensor
    rows: slice | None
    share: float
    facts: dict[str, Any] = field(default_factory=dict)


class Sequential:
    """Yields a job's problems, by groups of linears that have the same inputs.

    The caller writes the solutions of a group to the artifact before it asks for the next group. `begin` is called
    before the first group is made, after a guided pass, which reports progress of its own.

    Several processes share the passes, shard by shard. Each has its own problems of every group, or none.
    """

    def __init__(self, job: Job, model: BlockModel, begin: Callable[[], None]) -> None:
        self.job, self.model, self.recipe, self.processes = job, model, job.recipe, job.processes
        self.begin = begin

    def groups(self) -> Iterator[Iterator[Problem]]:
        """Yields the problems of every group that has unfinished linears."""
        self._start()
        originals = (block for _, block in self.model.blocks()) if self.recipe.asymmetric else repeat(None)
        # A block that `blocks` has yielded is gone when the next one is loaded.
        pairs = zip(self.model.blocks(), originals, strict=False)
        for (index, block), original in islice(pairs, self._unfinished_blocks()):
            self.model.expect(index + 1)
            for group in self.model.architecture.linears_of(index):
                if names := self.processes.from_first(self.job.unfinished(self.model, index, group)):
                    yield self._group(group, names, block, original)
                    self.job.artifact.settle()
                    self.processes.wait()
                for linear in group:
                    self._carry_forward(linear_of(block, linear), self.model.weight_name(index, linear))
            self._run_through(block, self.inputs)
            if original is not None:
                self._run_through(original, self.full)

    def _start(self) -> None:
        """Embeds this process's share of the calibration sequences."""
        self.weights = token_weights(self.job, self.model) if self.job.moments_type == "guided" else {}
        self.begin()
        shards = sharded(self.job.sequences)
        self.rounds = list(self.processes.rounds(len(shards)))
        numbered = list(enumerate(batch for shard in shards for batch in shard))
        ends = list(accumulate(map(len, shards), initial=0))
        self.shards = [numbered[ends[i] : ends[i + 1]] for i in self.processes.share_of(range(len(shards)))]
        self.keep = self.job.placement.hidden.keep
        self.inputs = {number: self.keep(self.model.start(ids)) for shard in self.shards for number, ids in shard}
        self.full = dict(self.inputs)
        self.model.let_go()
        self.lengths = [ids.numel() for _, ids in numbered]
        # The block adds the outputs of these two linears to its hidden states: attention's first, then the MLP's.
        self.first, self.last = self.model.architecture.adders

    def _unfinished_blocks(self) -> int:
        """Returns the number of blocks up to the last one that has an unfinished linear."""
        job, groups = self.job, self.model.architecture.linears_of
        counts = (i + 1 for i in range(len(self.model)) for group in groups(i) if job.unfinished(self.model, i, group))
        return self.processes.from_first(max(counts, default=0))

    def _run_through(self, block: nn.Module, states: dict[int, Tensor]) -> None:
        """Replaces hidden states by the block's outputs."""
        for number, batch in states.items():
            states[number] = self.keep(self.model.run(block, batch.to(self.model.device)))

    def _group(self, group: Group, names: list[str], block: nn.Module, original: nn.Module | None) -> Iterator[Problem]:
        """Yields this process's share of the named linears of a group."""
        runs, share = self._dealt(names)
        if original is None:
            hessian = self._moments(group, block)
            for name, rows in runs:
                yield Problem(name, self._checked_weight(name), hessian, rows, share)
            return
        cross = self._cross_moments(group, names, block, original)
        for name, rows in runs:
            weight = self._checked_weight(name).to(self.job.device).float()
            # Every process that solves a part of the linear computes the whole target: the strength is of all rows.
            with inputs_of(name):
                target, strength = cross[name].target(weight, self.recipe.dampening)
                check_target(target)
            yield Problem(name, target, cross[name].hessian(), rows, share, {"asymmetric_strength": strength})

    def _checked_weight(self, name: str) -> Tensor:
        """Returns a linear's weight. Raises UserError if its type cannot hold it."""
        weight = self.job.source.read(name)
        check_weights(name, weight, self.job.linears[name].codec_name)
        return weight

    def _dealt(self, names: list[str]) -> tuple[list[tuple[str, slice | None]], float]:
        """Returns the linears, or runs of their rows, that this process solves, and its share of all weights."""
        linears = [self.job.linears[name] for name in names]
        is_whole = [bool(self.recipe.rank) or not rows_are_apart(linear.codec_name) for linear in linears]
        rows = [1 if whole else linear.matrix[0] for linear, whole in zip(linears, is_whole, strict=True)]
        own = dealt(rows, self.processes.count)[self.processes.rank]
        weights = sum(linears[i].weights * (run.stop - run.start) / rows[i] for i, run in own)
        runs = [(names[i], None if run == slice(0, rows[i]) else run) for i, run in own]
        return runs, weights / sum(linear.weights for linear in linears)

    def _moments(self, group: Group, block: nn.Module) -> Tensor:
        """Returns the second moments of a group's inputs, on all processes."""
        columns = linear_of(block, group[0]).in_features
        moments = SecondMoments(columns, self.job.moments_type, self.job.device, keep=self.job.placement.moments.keep)
        for turn, (shard, senders) in enumerate(self.rounds):
            for number, _ in self.shards[turn] if shard is not None else ():
                moments.add(input_of(self.model, block, group[0], self.inputs[number]))
            moments.end_shard(self.processes, 0, senders)
        if self.processes.count == 1:
            return moments.hessian()
        # NCCL sends only what is on the device.
        own = moments.hessian().to(self.job.device) if self.processes.first else None
        return self.processes.broadcast(torch.empty(columns, columns, device=self.job.device) if own is None else own)

    def _cross_moments(
        self, group: Group, names: list[str], block: nn.Module, original: nn.Module
    ) -> dict[str, CrossMoments]:
        """Returns the sums of asymmetric calibration by linear.

        The linears of a group share one object, but guided ones do not: each weighs the tokens in its own way.
        """
        linear = linear_of(block, group[0])
        rows = linear.out_features if group[0] in (self.first, self.last) else 0
        apart = names if self.weights else names[:1]
        sums = {
            name: CrossMoments(linear.in_features, self.job.moments_type, self.job.placement, rows) for name in apart
        }
        weights = {name: self.weights[name].split(self.lengths) for name in apart} if self.weights else {}
        for turn, (shard, senders) in enumerate(self.rounds):
            for number, _ in self.shards[turn] if shard is not None else ():
                full = self._entering(group[0], original, self.full[number])
                quantized = self._entering(group[0], block, self.inputs[number])
                for name, cross in sums.items():
                    cross.add(number % 2, full, quantized, weights[name][number] if weights else None)
            for cross in sums.values():
                cross.end_shard(self.processes, senders)
        for cross in sums.values():
            cross.share(self.processes)
        return sums if self.weights else dict.fromkeys(names, sums[names[0]])

    def _entering(self, linear: str, block: nn.Module, hidden: Tensor) -> Entering:
        """Returns what enters a linear when the block runs on hidden states."""
        if linear == self.last:
            return Entering(*to_the_end(self.model, block, linear, hidden))
        inputs = input_of(self.model, block, linear, hidden)
        return Entering(inputs, hidden.to(inputs.device) if linear == self.first else None)

    def _carry_forward(self, linear: nn.Linear, name: str) -> None:
        """Gives a linear of the block the weights that the file decodes to."""
        values, correction = values_of(self.job.artifact.read(name)), stored_correction(self.job.artifact, name)
        linear.weight.data = (values if correction is None else values + correction).to(linear.weight)
