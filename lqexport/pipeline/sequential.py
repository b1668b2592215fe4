"""Problems of the quantized prefix: each linear is solved on the inputs that the quantized linears before it give.

Linears come in the order in which data flows (true-sequential, as GPTQ and LeanQuant do it). With asymmetric
calibration the full-precision model runs beside the quantized one, and says what each linear should aim at
(`lqexport.calibration.asymmetric`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, groupby, islice, repeat
from typing import Any

import torch
from torch import Tensor, nn

from lqexport.calibration.asymmetric import CrossMoments, Entering
from lqexport.calibration.collect import sharded
from lqexport.calibration.moments import Group, SecondMoments
from lqexport.calibration.paused import PausedBlock, execution_order
from lqexport.models.blocks import BlockModel, linear_of
from lqexport.pipeline.job import Job
from lqexport.pipeline.kept_states import KeptStates
from lqexport.pipeline.second_moments import token_weights
from lqexport.runtime.tiles import dealt
from lqexport.solver.cholesky import CholeskyFactor
from lqexport.solver.corrected_linear import stored_correction
from lqexport.solver.input_checks import check_target, inputs_of
from lqexport.solver.linear import factor_of, rows_are_apart
from lqexport.solver.weight_checks import check_weights
from lqexport.storage.artifact import SolvedModel, values_of


@dataclass(frozen=True)
class Problem:
    """One linear to solve.

    weight    the weights to come near to, any float dtype [R, C]
    hessian   second moments of its inputs, float32 [C, C]
    cholesky  their factor, which the linears of a group share
    rows      the rows that this process solves while others solve the rest; None for all rows
    share     this process's share of all weights that the processes solve at the same time
    facts     what to store with the solved linear
    """

    name: str
    weight: Tensor
    hessian: Tensor
    cholesky: CholeskyFactor
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
        self.orders: dict[tuple[Group, ...], list[Group]] = {}

    def groups(self) -> Iterator[Iterator[Problem]]:
        """Yields the problems of every group that has unfinished linears."""
        self._start()
        first, end = self.first_block, self.end
        originals = (block for _, block in self.model.blocks(first)) if self.recipe.asymmetric else repeat(None)
        # A block that `blocks` has yielded is gone when the next one is loaded.
        pairs = zip(self.model.blocks(first), originals, strict=False)
        for (index, block), original in islice(pairs, end - first):
            self.model.expect(index + 1)
            groups = self._ordered(index, block)
            self.quantized = self._paused(block, groups, self.inputs)
            self.original = self._paused(original, groups, self.full) if original is not None else None
            for group in groups:
                if names := self.processes.from_first(self.job.unfinished(self.model, index, group)):
                    yield self._group(group, names, block)
                    self.job.artifact.settle()
                    self.processes.wait()
                for linear in group:
                    self._carry_forward(linear_of(block, linear), self.model.weight_name(index, linear))
                for paused in (self.quantized, self.original):
                    if paused is not None:
                        paused.solved(group)
            self._finish(self.quantized, self.inputs)
            if self.original is not None:
                self._finish(self.original, self.full)
            if index + 1 < end:
                self._keep_states(index + 1)

    def _ordered(self, index: int, block: nn.Module) -> list[Group]:
        """Returns the groups of a block in the order in which it computes them."""
        groups = self.model.architecture.linears_of(index)
        if groups not in self.orders:
            number = next(iter(self.inputs), None)
            order = list(groups) if number is None else execution_order(self.model, block, groups, self.inputs[number])
            self.orders[groups] = self.processes.from_first(order)
        return self.orders[groups]

    def _paused(self, block: nn.Module, groups: list[Group], hidden: dict[int, Tensor]) -> PausedBlock:
        last = self.last if self.recipe.asymmetric else None
        return PausedBlock(self.model, block, groups, last, hidden, self.held)

    def _start(self) -> None:
        """Embeds this process's share of the calibration sequences, or reads what an earlier run kept of them."""
        self.weights = token_weights(self.job, self.model) if self.job.moments_type == "guided" else {}
        self.begin()
        shards = sharded(self.job.sequences)
        self.rounds = list(self.processes.rounds(len(shards)))
        numbered = list(enumerate(batch for shard in shards for batch in shard))
        ends = list(accumulate(map(len, shards), initial=0))
        self.shard_numbers = self.processes.share_of(range(len(shards)))
        self.shards = [numbered[ends[i] : ends[i + 1]] for i in self.shard_numbers]
        self.keep = self.job.placement.hidden.keep
        self.held = self.job.placement.held // max(1, max(ids.numel() for _, ids in numbered))
        self.kept = KeptStates(self.job.work_folder / "prefix", len(shards))
        most, self.end = self.processes.from_first(self._unfinished_blocks())
        self.first_block = self.processes.from_first(self.kept.last(most))
        self.inputs: dict[int, Tensor] = {}
        self.full: dict[int, Tensor] = {}
        if self.first_block:
            self._read_states()
        else:
            self._embed()
        self.lengths = [ids.numel() for _, ids in numbered]
        # The block adds the outputs of these two linears to its hidden states: attention's first, then the MLP's.
        self.first, self.last = self.model.architecture.adders

    def _embed(self) -> None:
        """Embeds this process's share of the calibration sequences, for both models."""
        self.full = self._started(self.model)
        self.inputs = dict(self.full)
        if self.recipe.parsed_target.quantizes_embedding:
            names = [tensor.name for tensor in self.job.planned]
            self.inputs = self._started(
                self.job.model_of(SolvedModel(self.job.artifact, self.job.source.config, names))
            )
        if not self.recipe.asymmetric:
            self.full.clear()

    def _started(self, model: BlockModel) -> dict[int, Tensor]:
        """Returns what enters the first block for each batch of this process, with a model's embedding."""
        hidden = {number: self.keep(model.start(ids)) for shard in self.shards for number, ids in shard}
        model.let_go()
        return hidden

    def _unfinished_blocks(self) -> tuple[int, int]:
        """Returns the first block that has an unfinished linear, and the number of blocks up to the last one."""
        job, groups = self.job, self.model.architecture.linears_of
        blocks = [i for i in range(len(self.model)) for group in groups(i) if job.unfinished(self.model, i, group)]
        return (blocks[0], blocks[-1] + 1) if blocks else (0, 0)

    def _states(self) -> dict[str, dict[int, Tensor]]:
        """Returns the hidden states between blocks, by model and batch."""
        return {"quantized": self.inputs, "full": self.full} if self.recipe.asymmetric else {"quantized": self.inputs}

    def _keep_states(self, index: int) -> None:
        """Keeps the inputs of block `index`, where a resumed run then begins, if it is time to.

        It does not where the disk would lack the room for them and for what is still to be written.
        """
        if not self.processes.from_first(self.kept.is_due()):
            return
        states, job = self._states(), self.job
        own_bytes = sum(tensor.nbytes for tensors in states.values() for tensor in tensors.values())
        unwritten = sum(tensor.nbytes for tensor in job.planned if tensor.name not in job.artifact)
        needed = sum(self.processes.gathered(own_bytes)) + unwritten
        if not self.processes.from_first(shutil.disk_usage(job.artifact.folder).free >= needed):
            return
        for shard, batches in zip(self.shard_numbers, self.shards, strict=True):
            keys = [(model, number) for model in states for number, _ in batches]
            self.kept.write(index, shard, {_state_name(*key): states[key[0]][key[1]] for key in keys})
        self.processes.wait()
        if self.processes.first:
            self.kept.leave_only(index)

    def _read_states(self) -> None:
        """Reads this process's share of the hidden states that an earlier run kept."""
        for shard, batches in zip(self.shard_numbers, self.shards, strict=True):
            named = self.kept.read(self.first_block, shard)
            for model, tensors in self._states().items():
                tensors.update((number, self.keep(named[_state_name(model, number)])) for number, _ in batches)
        # So that the model knows the blocks' other arguments, such as positions.
        for ids in {ids.shape: ids for batches in self.shards for _, ids in batches}.values():
            self.model.start(ids)
        self.model.let_go()

    def _finish(self, block: PausedBlock, states: dict[int, Tensor]) -> None:
        """Replaces hidden states by the block's outputs."""
        for number in states:
            states[number] = self.keep(block.output(number))

    def _group(self, group: Group, names: list[str], block: nn.Module) -> Iterator[Problem]:
        """Yields this process's share of the named linears of a group."""
        runs, share = self._dealt(names)
        if self.original is None:
            hessian = self._moments(group, block)
            if runs:
                cholesky = self._factor(runs[0][0], hessian)
                for name, rows in runs:
                    yield Problem(name, self._checked_weight(name), hessian, cholesky, rows, share)
            return
        cross = self._cross_moments(group, names, linear_of(block, group[0]), self.original)
        for moments, linears in groupby(runs, key=lambda run: cross[run[0]]):
            yield from self._asymmetric(moments, list(linears), share)

    def _asymmetric(
        self, moments: CrossMoments, linears: list[tuple[str, slice | None]], share: float
    ) -> Iterator[Problem]:
        """Yields the problems of the linears, and their rows, that share the sums of asymmetric calibration."""
        cholesky = self._factor(linears[0][0], moments.hessian())
        for name, rows in linears:
            weight = self._checked_weight(name).to(self.job.device).float()
            # Every process that solves a part of the linear computes the whole target: the strength is of all rows.
            with inputs_of(name):
                target, strength = moments.target(weight, cholesky)
                check_target(target)
            facts = {"asymmetric_strength": strength}
            yield Problem(name, target, moments.hessian(), cholesky, rows, share, facts)

    def _factor(self, name: str, hessian: Tensor) -> CholeskyFactor:
        """Returns the factor of the second moments of a group's inputs; `name` is one of the group's linears."""
        settings = self.job.recipe_of(name).solver_settings
        return factor_of(name, hessian.to(self.job.device), settings, self.job.placement, self.job.solved_together)

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
        dealt_runs = dealt(rows, self.processes.count)[self.processes.rank]
        weights = sum(linears[i].weights * (run.stop - run.start) / rows[i] for i, run in dealt_runs)
        runs = [(names[i], None if run == slice(0, rows[i]) else run) for i, run in dealt_runs]
        return runs, weights / sum(linear.weights for linear in linears)

    def _moments(self, group: Group, block: nn.Module) -> Tensor:
        """Returns the second moments of a group's inputs, on all processes."""
        columns = linear_of(block, group[0]).in_features
        moments = SecondMoments(columns, self.job.moments_type, self.job.device, keep=self.job.placement.moments.keep)
        for turn, (shard, senders) in enumerate(self.rounds):
            for number, _ in self.shards[turn] if shard is not None else ():
                moments.add(self.quantized.inputs(group, number))
            moments.end_shard(self.processes, 0, senders)
        if self.processes.count == 1:
            return moments.hessian()
        # NCCL sends only what is on the device.
        if self.processes.first:
            return self.processes.broadcast(moments.hessian().to(self.job.device))
        return self.processes.broadcast(torch.empty(columns, columns, device=self.job.device))

    def _cross_moments(
        self, group: Group, names: list[str], linear: nn.Linear, original: PausedBlock
    ) -> dict[str, CrossMoments]:
        """Returns the sums of asymmetric calibration by linear.

        The linears of a group share one object, but guided ones do not: each weighs the tokens in its own way.
        """
        rows = linear.out_features if group[0] in (self.first, self.last) else 0
        apart = names if self.weights else names[:1]
        sums = {
            name: CrossMoments(linear.in_features, self.job.moments_type, self.job.placement, rows) for name in apart
        }
        weights = {name: self.weights[name].split(self.lengths) for name in apart} if self.weights else {}
        for turn, (shard, senders) in enumerate(self.rounds):
            for number, _ in self.shards[turn] if shard is not None else ():
                full = self._entering(group, original, number, self.full)
                quantized = self._entering(group, self.quantized, number, self.inputs)
                for name, cross in sums.items():
                    cross.add(number % 2, full, quantized, weights[name][number] if weights else None)
            for cross in sums.values():
                cross.end_shard(self.processes, senders)
        for cross in sums.values():
            cross.share(self.processes)
        return sums if self.weights else dict.fromkeys(names, sums[names[0]])

    def _entering(self, group: Group, block: PausedBlock, number: int, hidden: dict[int, Tensor]) -> Entering:
        """Returns what enters a group of linears for a batch."""
        if group[0] == self.last:
            return Entering(*block.added_to(number))
        inputs = block.inputs(group, number)
        return Entering(inputs, hidden[number].to(inputs.device) if group[0] == self.first else None)

    def _carry_forward(self, linear: nn.Linear, name: str) -> None:
        """Gives a linear of the block the weights that the file decodes to."""
        values, correction = values_of(self.job.artifact.read(name)), stored_correction(self.job.artifact, name)
        linear.weight.data = (values if correction is None else values + correction).to(linear.weight)


def _state_name(model: str, number: int) -> str:
    """Returns how a batch's hidden states in one of the two models are called in the files that keep them."""
    return f"{model}-{number:06}"
