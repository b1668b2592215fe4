"""The processes that share a run, as torchrun starts them: who does what, and how they exchange (torch.distributed).

All processes make the same calls in the same order, and all write into one artifact folder. What a run computes does
not depend on their number: second moments are sums of fixed shards of the sequences, added in the order of the shards.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
from torch import Tensor, distributed

T = TypeVar("T")

PATIENCE = timedelta(days=30)
"""How long a process waits for another: tuning is the work of one. A process that died ends the wait, by torchrun."""


@dataclass(frozen=True)
class Processes:
    """This process's number among `count`; alone, every call gives back what it was given, and nothing waits."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that does what only one may."""
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> list[T]:
        """This process's share of some items: every `count`-th."""
        return list(items[self.rank :: self.count])

    def rounds(self, shards: int) -> Iterator[tuple[int | None, int]]:
        """Turns in which the processes work through so many shards in their order, one each: this process's shard, None
        where the last turn has none for it, and how many processes have one."""
        for start in range(0, shards, self.count):
            busy = min(self.count, shards - start)
            yield start + self.rank if self.rank < busy else None, busy

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            distributed.barrier()

    def agreed(self, value: T) -> T:
        """What the first process found."""
        if self.count == 1:
            return value
        shared = [value]
        distributed.broadcast_object_list(shared)
        return shared[0]

    def collected(self, tensor: Tensor, owner: int, senders: int) -> Iterator[Tensor]:
        """At process `owner`, the tensors of the first `senders` processes, in their order; at others nothing. All must
        go through to the end."""
        if self.rank != owner:
            if self.rank < senders:
                distributed.send(tensor, owner)
            return
        for rank in range(senders):
            part = tensor
            if rank != owner:
                distributed.recv(part := torch.empty_like(tensor), rank)
            yield part

    def given(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, in the place of each one's own."""
        if self.count > 1:
            distributed.broadcast(tensor, 0)
        return tensor

    def everyones(self, value: T) -> list[T]:
        """What each process has, in their order."""
        if self.count == 1:
            return [value]
        found: list[T | None] = [None] * self.count
        distributed.all_gather_object(found, value)
        return cast(list[T], found)

    def largest(self, tensor: Tensor) -> Tensor:
        """The elementwise maximum over all processes, in the place of each one's own."""
        if self.count > 1:
            distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
        return tensor


ALONE = Processes()


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """The processes that torchrun started, or whose group the caller has begun; over NCCL for a GPU, else over Gloo."""
    if distributed.is_initialized():
        yield Processes(distributed.get_rank(), distributed.get_world_size())
        return
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
