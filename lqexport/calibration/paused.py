"""Runs batches through a decoder block that pauses at its linears, so that they can be solved in the middle of a pass.

With a quantized prefix, the inputs of a group of linears are known only when the linears before it are solved. Each
batch's computation runs in a greenlet, which pauses where the next unsolved group is reached and goes on from there
once the group is solved. So a block costs one pass, however many groups it has. The values are those of a pass that
begins anew for every group; that is also what happens for the batches whose paused computations memory cannot hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from lqexport.calibration.moments import Group
from lqexport.converters.models.tensor_names import expert_number, of_each_expert
from lqexport.models.blocks import BlockModel, linear_of


class _Run(greenlet):
    """One batch's computation of a block. A switch to it returns when it pauses or has ended.

    at        the group that it has paused at; None before the first pause and at the end
    inputs    what enters that group's linears, [..., C]
    output    the block's output, once the run has ended
    """

    def __init__(self, model: BlockModel, block: nn.Module, hidden: Tensor) -> None:
        super().__init__()
        self.at: Group | None = None
        self.inputs: Tensor | None = None
        self.output: Tensor | None = None
        self._model, self._block, self._hidden = model, block, hidden

    def run(self) -> None:
        hidden, self._hidden = self._hidden.to(self._model.device), torch.empty(0)
        self.output = self._model.forward(self._block, hidden)
        self.at = None

    def go_on(self) -> None:
        """Runs to the next pause or to the end. Autocast is entered here, since its state belongs to the thread."""
        self.inputs = None
        with self._model.autocast():
            self.switch()

    def to_the_end(self) -> None:
        """Runs to the end."""
        while not self.dead:
            self.go_on()

    def pause(self, group: Group, inputs: Tensor) -> None:
        """Pauses at a group. Called within the run."""
        self.at, self.inputs = group, inputs
        assert self.parent is not None
        self.parent.switch()


def execution_order(model: BlockModel, block: nn.Module, groups: Sequence[Group], hidden: Tensor) -> list[Group]:
    """Returns the groups in the order in which the block computes them; those of an expert follow each other.

    hidden   the hidden states of a batch that enter the block
    """
    called: dict[str, int] = {}

    def noting(linear: str) -> Callable[..., None]:
        def before(*_: object) -> None:
            called.setdefault(of_each_expert(linear), len(called))

        return before

    linears = [linear for group in groups for linear in group]
    handles = [linear_of(block, linear).register_forward_pre_hook(noting(linear)) for linear in linears]
    model.run(block, hidden.to(model.device))
    for handle in handles:
        handle.remove()

    def place(group: Group) -> int:
        return min(called.get(of_each_expert(linear), len(called)) for linear in group)

    experts = min((place(group) for group in groups if expert_number(group[0]) is not None), default=0)

    def key(group: Group) -> tuple[int, int, int]:
        number = expert_number(group[0])
        return (place(group), 0, 0) if number is None else (experts, number, place(group))

    return sorted(groups, key=key)


class PausedBlock:
    """A decoder block and this process's batches, which run through it group by group.

    The caller asks for a group's inputs in the order of `execution_order`, solves the group, gives its linears their
    new weights and calls `solved`.

    groups   the groups of linears of the block
    last     the linear whose output is the last that the block adds to its hidden states, where these hidden states are
             wanted, too; None if not
    hidden   the hidden states that enter the block, for each batch by its number, wherever they are kept
    held     the number of batches whose runs are held while they are paused; the others begin anew for each group
    """

    def __init__(
        self, model: BlockModel, block: nn.Module, groups: Sequence[Group], last: str | None,
        hidden: dict[int, Tensor], held: int,
    ) -> None:  # fmt: skip
        self._model, self._block, self._hidden = model, block, hidden
        self._unsolved = {group for group in groups if last not in group}
        self._held = set(list(hidden)[:held])
        self._runs: dict[int, _Run] = {}
        self._last = linear_of(block, last) if last else None
        for group in groups:
            for linear in group:
                linear_of(block, linear).register_forward_pre_hook(self._pausing_at(group))
        if self._last is not None:
            self._last.forward = self._added_later  # type: ignore[method-assign, assignment]

    def _pausing_at(self, group: Group) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def before(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if group in self._unsolved and isinstance(run := getcurrent(), _Run):
                run.pause(group, arguments[0])

        return before

    def _added_later(self, inputs: Tensor) -> Tensor:
        """Replaces `last`, so that the block's output is the hidden states that the linear's output is added to."""
        run = getcurrent()
        assert isinstance(run, _Run)
        run.inputs = inputs
        assert self._last is not None
        return inputs.new_zeros(*inputs.shape[:-1], self._last.out_features)

    def inputs(self, group: Group, number: int) -> Tensor:
        """Returns what enters a group's linears for a batch, [..., C]; for an expert, the tokens that are routed to it.

        The group must not hold `last`.
        """
        run = self._run(number)
        while run.at is None and not run.dead:
            run.go_on()
        if run.at != group or run.inputs is None:  # no token of this batch is routed to this expert
            inputs = torch.empty(0, linear_of(self._block, group[0]).in_features, device=self._model.device)
        else:
            inputs = run.inputs
        self._put_away(number, run)
        return inputs

    def solved(self, group: Group) -> None:
        """Lets the runs pass a group, whose linears have the weights that they shall have."""
        self._unsolved.discard(group)
        for run in self._runs.values():
            if run.at == group:
                run.at = None

    def added_to(self, number: int) -> tuple[Tensor, Tensor]:
        """Returns the inputs of `last`, [..., C], and the hidden states that its output is added to, [..., R].

        All groups but that of `last` must be solved.
        """
        run = self._run(number)
        run.to_the_end()
        assert run.inputs is not None
        assert run.output is not None
        self._put_away(number, run)
        return run.inputs, run.output

    def output(self, number: int) -> Tensor:
        """Returns the block's output for a batch, once all groups are solved. The run is dropped."""
        if self._last is None:
            run = self._run(number)
            run.to_the_end()
            assert run.output is not None
            output = run.output
        else:
            inputs, stream = self.added_to(number)
            with self._model.autocast():
                output = stream + nn.Linear.forward(self._last, inputs)
        self._runs.pop(number, None)
        return output

    def _run(self, number: int) -> _Run:
        run = self._runs.pop(number, None)  # a greenlet that has ended is false
        return _Run(self._model, self._block, self._hidden[number]) if run is None else run

    def _put_away(self, number: int, run: _Run) -> None:
        if number in self._held:
            self._runs[number] = run
        elif not run.dead:
            run.throw()  # ends the run, which frees what it holds
