"""The processes that share a run (torchrun): how they divide the work, and how they exchange data (torch.distributed).

All processes make the same calls in the same order, and all write into one artifact folder. The result of a run does
not depend on their number: Hessians are sums over fixed shards of the calibration sequences, added in the order of the
shards.
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
"""How long a process waits for another before it gives up.

It is long because one process alone does the tuning. If a process dies, torchrun ends the others.
"""


@dataclass(frozen=True)
class Processes:
    """This process among all that share the run. With one process, every exchange returns its argument at once.

    rank    this process's number, from 0
    count   the number of processes
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is process 0, which does the work that only one process may do."""
        return self.rank == 0

    def share_of(self, items: Sequence[T]) -> list[T]:
        """Returns this process's share of the items: every `count`-th, starting at its rank."""
        return list(items[self.rank :: self.count])

    def rounds(self, shards: int) -> Iterator[tuple[int | None, int]]:
        """Yields the rounds in which the processes work through `shards` shards in order, one shard each.

        A round is this process's shard (None if the last round has none for it) and how many processes have one.
        """
        for start in range(0, shards, self.count):
            busy = min(self.count, shards - start)
            yield start + self.rank if self.rank < busy else None, busy

    def wait(self) -> None:
        """Waits until all processes have made this call."""
        if self.count > 1:
            distributed.barrier()

    def from_first(self, value: T) -> T:
        """Returns the first process's `value` on all processes. The value is pickled."""
        if self.count == 1:
            return value
        shared = [value]
        distributed.broadcast_object_list(shared)
        return shared[0]

    def received(self, tensor: Tensor, owner: int, senders: int) -> Iterator[Tensor]:
        """Yields, on process `owner`, the tensors of the first `senders` processes in the order of their ranks.

        Other processes yield nothing. Every process must run the iterator to its end, since that is what sends its
        tensor.
        """
        if self.rank != owner:
            if self.rank < senders:
                distributed.send(tensor, owner)
            return
        for rank in range(senders):
            received = tensor
            if rank != owner:
                distributed.recv(received := torch.empty_like(tensor), rank)
            yield received

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Overwrites `tensor` on every process with the first process's, and returns it."""
        if self.count > 1:
            distributed.broadcast(tensor, 0)
        return tensor

    def gathered(self, value: T) -> list[T]:
        """Returns the values of all processes, in the order of their ranks. The values are pickled."""
        if self.count == 1:
            return [value]
        values: list[T | None] = [None] * self.count
        distributed.all_gather_object(values, value)
        return cast(list[T], values)

    def maximum(self, tensor: Tensor) -> Tensor:
        """Overwrites `tensor` on every process with the elementwise maximum over all processes, and returns it."""
        if self.count > 1:
            distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
        return tensor


ALONE = Processes()


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """Joins the processes that torchrun started, over NCCL for a GPU and else over Gloo, and leaves them at the end.

    Uses the process group that the caller has initialized, if there is one. Gives ALONE without torchrun.
    """
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
