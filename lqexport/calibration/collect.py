"""Collects plain and normalized second moments over the calibration sequences, in one forward pass.

The pass goes through the full-precision model one decoder block at a time. One block's weights and the sequences'
hidden states are in memory. Guided second moments need a backward pass, too: `lqexport.calibration.guided`.

Sequences are cut into shards, which several processes share (see `lqexport.runtime.processes`). Each process yields the
blocks whose linears it is to solve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lqexport.calibration.block_collector import BlockCollector, BlockMoments, Collector
from lqexport.calibration.moments import Group, SecondMoments
from lqexport.models.blocks import BlockModel, linear_of
from lqexport.recipe import Moments
from lqexport.runtime.placement import Keep, in_place
from lqexport.runtime.processes import ALONE, Processes
from lqexport.runtime.progress import Listener, Silent

BATCH_TOKENS = 1024
"""Tokens in one forward pass. The last bits of a pass depend on it, so it must not depend on how much memory there is.
Larger batches are no faster on a CPU."""
SHARDS = 8
"""The largest number of shards, runs of batches whose second moments are summed by themselves.

It is also the largest number of processes that can share the passes."""


def batches(tokens: Tensor) -> list[Tensor]:
    """Returns token ids int64 [samples, length] in batches of sequences, each for one forward pass."""
    return list(tokens.split(max(1, BATCH_TOKENS // tokens.shape[1])))


def sharded(tokens: Tensor) -> list[list[Tensor]]:
    """Returns the batches of token ids [samples, length] in at most `SHARDS` runs of nearly equal length."""
    runs = batches(tokens)
    count = min(SHARDS, len(runs))
    return [runs[i * len(runs) // count : (i + 1) * len(runs) // count] for i in range(count)]


def embed(model: BlockModel, tokens: Tensor) -> list[Tensor]:
    """Returns the hidden states that enter the first block, on the host, for each batch of tokens [samples, length]."""
    return embed_batches(model, batches(tokens))


def embed_batches(model: BlockModel, ids: list[Tensor], keep: Keep = Tensor.cpu) -> list[Tensor]:
    """Returns the hidden states that enter the first block, for each batch of token ids, where `keep` puts them."""
    return [keep(model.start(batch)) for batch in ids]


def forward_moments(
    model: BlockModel, tokens: Tensor, moments_type: Moments, *, wanted: Callable[[int, Group], bool], last: int,
    processes: Processes = ALONE, keep: Keep = in_place, parts: int = 1, keep_states: Keep = Tensor.cpu,
) -> Iterator[BlockMoments]:  # fmt: skip
    """Yields the plain or normalized second moments of the linears, block by block.

    moments_type   plain or normalized
    keep           puts second moments where they stay

    The other arguments are those of `forward_pass`.
    """
    new = partial(SecondMoments, moments_type=moments_type, device=model.device, keep=keep)
    return forward_pass(
        model, tokens, new, wanted=wanted, last=last, processes=processes, parts=parts, keep_states=keep_states
    )


def forward_pass(
    model: BlockModel, tokens: Tensor, new: Callable[[int], Collector], *, wanted: Callable[[int, Group], bool],
    last: int, processes: Processes = ALONE, parts: int = 1, keep_states: Keep = Tensor.cpu,
) -> Iterator[BlockMoments]:  # fmt: skip
    """Yields what collectors sum up of the linears' inputs, block by block.

    tokens         token ids, int64 [samples, length]
    new            makes a collector for a number of columns
    wanted         says for a block's index and a group of linears whether it is wanted
    last           index of the last block that is needed
    processes      the processes that share the passes; each yields the blocks that it is to solve
    parts          a block's linears come in at most so many parts (see `BlockCollector`)
    keep_states    puts the sequences' hidden states where they stay
    """
    shards = sharded(tokens)
    hidden = [embed_batches(model, shards[i], keep_states) for i in processes.share_of(range(len(shards)))]
    rounds = list(processes.rounds(len(shards)))
    model.let_go()
    for window in windows(range(last + 1), processes):
        blocks = [_collector(model, index, wanted, parts, new) for index in window]
        count = max(len(collector.parts) for collector in blocks)
        for number in range(count):
            states = [list(batches) for batches in hidden]  # for each part, the blocks start from the same states
            for owner, collector in enumerate(blocks):
                _pass_forward(
                    model, collector, number, states, rounds, processes=processes, owner=owner, keep_states=keep_states
                )
            if number + 1 < count or window[-1] < last:
                model.expect(window[0] if number + 1 < count else window[-1] + 1)
            if processes.rank < len(blocks):
                yield blocks[processes.rank].moments()
        hidden = states


def _pass_forward(
    model: BlockModel, collector: BlockCollector, number: int, states: list[list[Tensor]],
    rounds: list[tuple[int | None, int]], *, processes: Processes, owner: int, keep_states: Keep,
) -> None:  # fmt: skip
    """Replaces this process's hidden states by a block's outputs, and collects part `number` for process `owner`."""
    block = model.block(collector.index)
    with collector.collecting(block, number, _inputs):
        for turn, (shard, senders) in enumerate(rounds):
            if shard is not None:
                run_through(model, block, states[turn], keep=keep_states)
            collector.end_shard(processes, owner, senders)


def _inputs(linear: nn.Linear, add: Callable[[Tensor], None]) -> RemovableHandle:
    return linear.register_forward_pre_hook(lambda _, arguments: add(arguments[0]))


def _collector(
    model: BlockModel, index: int, wanted: Callable[[int, Group], bool], parts: int, new: Callable[[int], Collector]
) -> BlockCollector:
    groups = model.architecture.linears_of(index)
    wanted_groups = [group for group in groups if wanted(index, group)]
    return BlockCollector(model.architecture, index, groups, wanted_groups, parts, new)


def windows(indices: Iterable[int], processes: Processes) -> Iterator[list[int]]:
    """Yields the blocks that are passed through together before they are solved: one for each process."""
    rest = iter(indices)
    while window := list(islice(rest, processes.count)):
        yield window


def add_outputs(moments: SecondMoments, model: BlockModel, tokens: Tensor, processes: Processes = ALONE) -> None:
    """Adds the inputs of the output layer to the first process's `moments`, for token ids [samples, length]."""
    shards = sharded(tokens)
    hidden = {i: embed_batches(model, shards[i]) for i in processes.share_of(range(len(shards)))}
    for _, block in model.blocks():
        for states in hidden.values():
            run_through(model, block, states)
    for shard, senders in processes.rounds(len(shards)):
        for batch in hidden[shard] if shard is not None else []:
            moments.add(model.normed(batch.to(model.device)))
        moments.end_shard(processes, 0, senders)


def input_magnitudes(
    model: BlockModel, tokens: Tensor, processes: Processes = ALONE, *, listener: Listener | None = None,
    description: str = "",
) -> dict[str, Tensor]:  # fmt: skip
    """Returns the largest mean |x_i| of any sequence for the inputs of every linear, float32 [C] by the weight's name.

    These are the magnitudes that L2QER measures in the full-precision model. `tokens` are token ids [samples, length].
    The listener gets a stage called `description`.
    """
    shards, listener = processes.share_of(sharded(tokens)), listener or Silent()
    listener.stage(description, len(model) * sum(map(len, shards)))
    inputs = embed_batches(model, [batch for shard in shards for batch in shard])
    magnitudes: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def before(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            magnitudes[name] = magnitudes[name].maximum(arguments[0].float().abs().mean(1).amax(0))

        return before

    for index, block in model.blocks():
        names = {model.weight_name(index, linear): linear for linear in model.linears(index)}
        for name, linear in names.items():
            magnitudes[name] = torch.zeros(linear_of(block, linear).in_features, device=model.device)
            linear_of(block, linear).register_forward_pre_hook(watch(name))
        run_through(model, block, inputs, listener)
        for name in names:
            processes.maximum(magnitudes[name])
    return magnitudes


def by_weight(model: BlockModel, moments: BlockMoments) -> dict[str, Tensor]:
    """Returns a block's second moments by the names of the weights that they belong to."""
    index, groups = moments
    return {model.weight_name(index, linear): hessian for group, hessian in groups.items() for linear in group}


def begin_with_first(moments: Iterator[BlockMoments], begin: Callable[[], None]) -> Iterator[BlockMoments]:
    """Passes `moments` on, and calls `begin` when the first ones arrive.

    Before them there may be a pass with progress of its own.
    """
    for number, item in enumerate(moments):
        if number == 0:
            begin()
        yield item
        item[1].clear()  # so that the caller's reference holds no memory while the next item is computed


def run_through(
    model: BlockModel, block: nn.Module, hidden: list[Tensor], listener: Listener | None = None,
    keep: Keep = Tensor.cpu,
) -> None:  # fmt: skip
    """Replaces every batch of hidden states by the block's outputs, on the host or where `keep` puts them.

    The listener advances by one for each batch.
    """
    listener = listener or Silent()
    for i, batch in enumerate(hidden):
        hidden[i] = keep(model.run(block, batch.to(model.device)))
        listener.advance(1)


def final_states(
    model: BlockModel, tokens: Tensor, listener: Listener | None = None, description: str = ""
) -> list[Tensor]:
    """Returns the hidden states [length, hidden] after the last block, for each sequence of tokens [samples, length].

    The listener gets a stage called `description`.
    """
    hidden, listener = embed(model, tokens), listener or Silent()
    listener.stage(description, len(model) * len(hidden))
    for _, block in model.blocks():
        run_through(model, block, hidden, listener)
    return [state for batch in hidden for state in batch]
