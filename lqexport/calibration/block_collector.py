"""Second moments of one decoder block's linears, of some of its experts at a time: all together may be more than a
device holds. How many there are at a time does not change what comes out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from lqexport.calibration.experts import fill_up, parts, pooled
from lqexport.calibration.moments import Group, SecondMoments, TokenWeights
from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.tensor_names import expert_number
from lqexport.models.blocks import linear_of
from lqexport.runtime.processes import Processes

Collector = SecondMoments | TokenWeights
"""What the passes fill for a group of linears."""
BlockMoments = tuple[int, dict[Group, Tensor]]
"""A block's index and the second moments of its linears, as `SecondMoments.hessian` gives them."""
Watch = Callable[[nn.Linear, Callable[..., None]], contextlib.AbstractContextManager[object]]
"""While open, a collector's `add` is given what passes through a linear."""


class BlockCollector:
    """What passes through block `index` for `wanted`, some of `groups`, its linears. There is a pass through the block
    for each part, in their order: `collecting`, `end_shard` after each shard, then `moments`. `count` is the most parts
    there may be, and `new` makes what collects so many columns."""

    def __init__(
        self, architecture: Architecture, index: int, groups: Sequence[Group], wanted: Sequence[Group], count: int,
        new: Callable[[int], Collector],
    ) -> None:  # fmt: skip
        self.index, self._architecture, self._new = index, architecture, new
        self.parts = [[group for group in part if group in wanted] for part in parts(groups, count)]
        self._pooled = pooled(wanted, groups, architecture)
        self._pools: dict[str, SecondMoments] = {}
        self._found: dict[Group, Collector] = {}
        self._open: list[Collector] = []

    def alone(self, number: int) -> list[int] | None:
        """The experts that a backward pass needs for part `number`, None for all: after the first part those whose
        linears it has, if what experts give is added up as it is, so that no gradient depends on what others give."""
        if number == 0 or not self._architecture.adds:
            return None
        numbers = (expert_number(group[0]) for group in self.parts[number])
        return sorted({number for number in numbers if number is not None})

    @contextlib.contextmanager
    def collecting(self, block: nn.Module, number: int, watch: Watch) -> Iterator[None]:
        """While open, part `number` is collected, if there is one, and with the first what all experts see together."""

        def made(linear: str) -> Collector:
            return self._new(linear_of(block, linear).in_features)

        part = self.parts[number] if number < len(self.parts) else []
        self._found = {group: made(group[0]) for group in part}
        self._open = list(self._found.values())
        watched = [(group[0], total) for group, total in self._found.items()]
        if number == 0:
            found = {kind: made(linears[0]) for kind, linears in self._pooled.items()}
            self._pools = {kind: pool for kind, pool in found.items() if isinstance(pool, SecondMoments)}
            self._open += self._pools.values()
            watched += [(linear, pool) for kind, pool in self._pools.items() for linear in self._pooled[kind]]
        with contextlib.ExitStack() as hooks:
            for linear, total in watched:
                hooks.enter_context(watch(linear_of(block, linear), total.add))
            yield
        for total in self._open:
            if isinstance(total, SecondMoments):
                total.release()

    def end_shard(self, processes: Processes, owner: int, senders: int) -> None:
        """As `SecondMoments.end_shard`, for all that this pass collects."""
        for total in self._open:
            total.end_shard(processes, owner, senders)

    def moments(self) -> BlockMoments:
        """The second moments of the part that was passed through last, at the process that has its totals."""
        found, self._found, self._open = self._found, {}, []
        own = {group: total for group, total in found.items() if isinstance(total, SecondMoments)}
        fill_up(own, self._pools, self._architecture)
        return self.index, {group: total.hessian() for group, total in found.items()}
