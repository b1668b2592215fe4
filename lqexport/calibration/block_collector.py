"""Collects the second moments of one decoder block's linears, some experts at a time.

A device may not hold those of all experts together. The result does not depend on how many experts a pass takes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from lqexport.calibration.experts import fill_up, parts, pooled
from lqexport.calibration.moments import Group, InputSquares, SecondMoments, TokenWeights
from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.tensor_names import expert_number
from lqexport.models.blocks import linear_of
from lqexport.runtime.processes import Processes

Collector = SecondMoments | TokenWeights | InputSquares
"""What sums up the inputs (and gradients) of a group of linears during the passes."""
BlockMoments = tuple[int, dict[Group, Tensor]]
"""A block's index and the second moments of its linears, as `SecondMoments.hessian` gives them."""
Watch = Callable[[nn.Linear, Callable[..., None]], contextlib.AbstractContextManager[object]]
"""A context manager for a linear and a collector's `add`: while open, `add` is called with what passes through."""


class BlockCollector:
    """Collects second moments in one decoder block, in one pass through the block for each part of its linears.

    For each part, in order, the caller opens `collecting`, calls `end_shard` after each shard, and then calls
    `moments`.

    index    the block's index
    groups   all groups of linears in the block
    wanted   the groups to collect
    count    the largest number of parts
    new      makes a collector for a number of columns
    """

    def __init__(
        self, architecture: Architecture, index: int, groups: Sequence[Group], wanted: Sequence[Group], count: int,
        new: Callable[[int], Collector],
    ) -> None:  # fmt: skip
        self.index, self._architecture, self._new = index, architecture, new
        self.parts = [[group for group in each if group in wanted] for each in parts(groups, count)]
        self._pooled = pooled(wanted, groups, architecture)
        self._pools: dict[str, SecondMoments] = {}
        self._collectors: dict[Group, Collector] = {}
        self._open: list[Collector] = []

    def experts_needed(self, number: int) -> list[int] | None:
        """Returns the numbers of the experts that a backward pass needs for part `number`; None for all experts.

        A later part needs only the experts whose linears it has, if the outputs of experts are simply added up. Then no
        gradient depends on the outputs of other experts. The first part needs all of them.
        """
        if number == 0 or not self._architecture.adds:
            return None
        numbers = (expert_number(group[0]) for group in self.parts[number])
        return sorted({number for number in numbers if number is not None})

    @contextlib.contextmanager
    def collecting(self, block: nn.Module, number: int, watch: Watch) -> Iterator[None]:
        """While open, collects part `number`, if there is one.

        With the first part, the inputs of all experts together are collected, too.
        """

        def collector_for(linear: str) -> Collector:
            return self._new(linear_of(block, linear).in_features)

        part = self.parts[number] if number < len(self.parts) else []
        self._collectors = {group: collector_for(group[0]) for group in part}
        self._open = list(self._collectors.values())
        watched = [(group[0], total) for group, total in self._collectors.items()]
        if number == 0:
            pools = {pattern: collector_for(linears[0]) for pattern, linears in self._pooled.items()}
            self._pools = {pattern: pool for pattern, pool in pools.items() if isinstance(pool, SecondMoments)}
            self._open += self._pools.values()
            watched += [(linear, pool) for pattern, pool in self._pools.items() for linear in self._pooled[pattern]]
        with contextlib.ExitStack() as hooks:
            for linear, total in watched:
                hooks.enter_context(watch(linear_of(block, linear), total.add))
            yield
        for total in self._open:
            if isinstance(total, SecondMoments):
                total.release()

    def end_shard(self, processes: Processes, owner: int, senders: int) -> None:
        """Calls `SecondMoments.end_shard` for every collector of this pass."""
        for total in self._open:
            total.end_shard(processes, owner, senders)

    def moments(self) -> BlockMoments:
        """Returns the second moments of the last part, on the process that has its totals."""
        collectors, self._collectors, self._open = self._collectors, {}, []
        second_moments = {group: total for group, total in collectors.items() if isinstance(total, SecondMoments)}
        fill_up(second_moments, self._pools, self._architecture)
        return self.index, {group: total.hessian() for group, total in collectors.items()}
