"""Collecting second moments over the calibration sequences, decoder block by decoder block.

`forward_moments` needs one forward pass and yields the first block first. `guided_moments` adds a backward pass of the
summed cross-entropy and yields the last block first: it keeps the inputs of every block on disk, and runs each block
again, with gradients, when its turn comes. Both take the inputs of every block from the full-precision blocks before,
and hold one block's weights in memory; the first also the sequences' hidden states, the second those of one shard.

Sequences are cut into shards, which several processes share (see `lqexport.processes`); each yields the blocks whose
linears it is to solve.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from lqexport.blocks import BlockModel
from lqexport.converters.architecture import Architecture
from lqexport.errors import AGAIN
from lqexport.experts import fill_up, with_all_experts
from lqexport.factor import Keep, in_place
from lqexport.moments import Group, SecondMoments, TokenWeights
from lqexport.processes import ALONE, Processes
from lqexport.progress import Listener, Silent
from lqexport.recipe import Moments
from lqexport.tensor_files import SEAL, open_tensors, write_sealed

BATCH_TOKENS = 1024
"""Tokens in one forward pass. The last bits of a pass depend on it, so it does not depend on the memory that there is.
Larger batches are no faster on a CPU."""
SHARDS = 8
"""Runs of batches whose second moments are summed by themselves: as many processes can share the passes."""

Collector = SecondMoments | TokenWeights
"""What the guided pass fills for a linear."""
BlockMoments = tuple[int, dict[Group, Tensor]]
"""A block's index and the second moments of its linears, as `SecondMoments.hessian` gives them."""


def batches(tokens: Tensor) -> list[Tensor]:
    """Token ids [samples, length] in runs that one forward pass takes."""
    return list(tokens.split(max(1, BATCH_TOKENS // tokens.shape[1])))


def sharded(tokens: Tensor) -> list[list[Tensor]]:
    """The batches of token ids [samples, length] in at most `SHARDS` runs of nearly equal length."""
    runs = batches(tokens)
    count = min(SHARDS, len(runs))
    return [runs[i * len(runs) // count : (i + 1) * len(runs) // count] for i in range(count)]


def embed(model: BlockModel, tokens: Tensor) -> list[Tensor]:
    """Hidden states that enter the first block, a batch at a time, kept on the host."""
    return embed_batches(model, batches(tokens))


def embed_batches(model: BlockModel, ids: list[Tensor]) -> list[Tensor]:
    """The same for batches of token ids."""
    return [model.start(batch).cpu() for batch in ids]


def forward_moments(
    model: BlockModel, tokens: Tensor, kind: Moments, wanted: Callable[[int, Group], bool], last: int,
    processes: Processes = ALONE, keep: Keep = in_place,
) -> Iterator[BlockMoments]:  # fmt: skip
    """Plain or normalized second moments of the wanted groups, up to block `last`; `keep` puts them where they stay."""
    new = partial(SecondMoments, kind=kind, device=model.device, keep=keep)
    passed = _forward(model, tokens, wanted, last, processes, new)
    while window := list(islice(passed, processes.count)):
        yield from (moments for moments in window if moments is not None)


def _forward(
    model: BlockModel, tokens: Tensor, wanted: Callable[[int, Group], bool], last: int, processes: Processes,
    new: Callable[[int], SecondMoments],
) -> Iterator[BlockMoments | None]:  # fmt: skip
    """Block by block, the moments where they are this process's."""
    shards = sharded(tokens)
    hidden = [embed_batches(model, shards[i]) for i in processes.mine(range(len(shards)))]
    model.let_go()
    for index in range(last + 1):
        every = model.architecture.linears_of(index)
        groups = with_all_experts([group for group in every if wanted(index, group)], every, model.architecture)
        found = _block_forward(model, index, groups, new, hidden, list(processes.rounds(len(shards))), processes)
        if index < last:
            model.expect(index + 1)
        yield found


def _block_forward(
    model: BlockModel, index: int, groups: list[Group], new: Callable[[int], SecondMoments], hidden: list[list[Tensor]],
    rounds: list[tuple[int | None, int]], processes: Processes,
) -> BlockMoments | None:  # fmt: skip
    """Replaces this process's hidden states by a block's outputs; its second moments, where they are this process's."""
    block, owner = model.block(index), index % processes.count
    with moments_of(block, groups, new) as moments:
        for turn, (shard, senders) in enumerate(rounds):
            if shard is not None:
                run_through(model, block, hidden[turn])
            for total in moments.values():
                total.end_shard(processes, owner, senders)
    return (index, _hessians(moments, model.architecture)) if owner == processes.rank else None


def _hessians(moments: Mapping[Group, Collector], architecture: Architecture) -> dict[Group, Tensor]:
    fill_up({group: total for group, total in moments.items() if isinstance(total, SecondMoments)}, architecture)
    return {group: total.hessian() for group, total in moments.items()}


def add_outputs(moments: SecondMoments, model: BlockModel, tokens: Tensor, processes: Processes = ALONE) -> None:
    """Add what enters the output layer to the first process's `moments`."""
    shards = sharded(tokens)
    hidden = {i: embed_batches(model, shards[i]) for i in processes.mine(range(len(shards)))}
    for _, block in model.blocks():
        for states in hidden.values():
            run_through(model, block, states)
    for shard, senders in processes.rounds(len(shards)):
        for batch in hidden[shard] if shard is not None else []:
            moments.add(model.normed(batch.to(model.device)))
        moments.end_shard(processes, 0, senders)


def input_magnitudes(
    model: BlockModel, tokens: Tensor, processes: Processes = ALONE, listener: Listener | None = None,
    description: str = "",
) -> dict[str, Tensor]:  # fmt: skip
    """Largest mean |x_i| of any sequence at every linear's inputs, float32 [C] by the weight's name: L2QER's profile of
    the full-precision model. A stage of `description` where somebody listens."""
    shards, listener = processes.mine(sharded(tokens)), listener or Silent()
    listener.stage(description, len(model) * sum(map(len, shards)))
    inputs = embed_batches(model, [batch for shard in shards for batch in shard])
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def before(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            found[name] = found[name].maximum(arguments[0].float().abs().mean(1).amax(0))

        return before

    for index, block in model.blocks():
        names = {model.weight_name(index, linear): linear for linear in model.linears(index)}
        for name, linear in names.items():
            found[name] = torch.zeros(linear_of(block, linear).in_features, device=model.device)
            linear_of(block, linear).register_forward_pre_hook(watch(name))
        run_through(model, block, inputs, listener)
        for name in names:
            processes.largest(found[name])
    return found


def by_weight(model: BlockModel, moments: BlockMoments) -> dict[str, Tensor]:
    """A block's second moments by the names of the weights that they are for."""
    index, groups = moments
    return {model.weight_name(index, linear): hessian for group, hessian in groups.items() for linear in group}


def begin_with_first(moments: Iterator[BlockMoments], begin: Callable[[], None]) -> Iterator[BlockMoments]:
    """Passes `moments` on, calling `begin` when the first arrive: a pass with progress of its own may come before."""
    for number, item in enumerate(moments):
        if number == 0:
            begin()
        yield item


def run_through(model: BlockModel, block: nn.Module, hidden: list[Tensor], listener: Listener | None = None) -> None:
    """Replace every batch of hidden states by the block's outputs; the listener advances by one for each."""
    listener = listener or Silent()
    for i, batch in enumerate(hidden):
        hidden[i] = model.run(block, batch.to(model.device)).cpu()
        listener.advance(1)


def final_states(
    model: BlockModel, tokens: Tensor, listener: Listener | None = None, description: str = ""
) -> list[Tensor]:
    """Hidden states [length, hidden] after the last block, for each of token ids [samples, length]; a stage of
    `description` where somebody listens."""
    hidden, listener = embed(model, tokens), listener or Silent()
    listener.stage(description, len(model) * len(hidden))
    for _, block in model.blocks():
        run_through(model, block, hidden, listener)
    return [state for batch in hidden for state in batch]


class _Reached(Exception):
    """Stops a block before a linear."""


def input_of(model: BlockModel, block: nn.Module, linear: str, hidden: Tensor) -> Tensor:
    """What enters a linear when the block runs on `hidden`, which it does no further than there; of an expert, the
    tokens that are routed to it."""
    caught: list[Tensor] = []

    def before(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        caught.append(arguments[0])
        raise _Reached

    handle = linear_of(block, linear).register_forward_pre_hook(before)
    try:
        with contextlib.suppress(_Reached):
            model.run(block, hidden.to(model.device))
    finally:
        handle.remove()
    return caught[0] if caught else hidden.new_empty(0, linear_of(block, linear).in_features)


def to_the_end(model: BlockModel, block: nn.Module, linear: str, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """What enters the linear whose output makes a block's output, and the hidden states that it is added to."""
    caught: list[Tensor] = []
    # A copy, since some models add to the output in place.
    handle = linear_of(block, linear).register_forward_hook(
        lambda _, arguments, output: caught.extend((arguments[0], output.clone()))
    )
    try:
        output = model.run(block, hidden.to(model.device))
    finally:
        handle.remove()
    return caught[0], output - caught[1]


@contextlib.contextmanager
def moments_of(
    block: nn.Module, groups: list[Group], new: Callable[[int], SecondMoments]
) -> Iterator[dict[Group, SecondMoments]]:
    """While open, whatever enters a group's first linear is added to the group's second moments."""
    moments: dict[Group, SecondMoments] = {}
    handles = []
    for group in groups:
        linear = linear_of(block, group[0])
        moments[group] = new(linear.in_features)

        def add(_: nn.Module, arguments: tuple[Tensor, ...], total: SecondMoments = moments[group]) -> None:
            total.add(arguments[0])

        handles.append(linear.register_forward_pre_hook(add))
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def linear_of(block: nn.Module, name: str) -> nn.Linear:
    """The linear of that name in a decoder block."""
    linear = block.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def guided_moments(
    model: BlockModel, tokens: Tensor, output_groups: int, folder: Path, listener: Listener,
    processes: Processes = ALONE, keep: Keep = in_place, held: bool = False, power: float = 1.0,
    weights: Callable[[BlockMoments], None] | None = None,
) -> Iterator[BlockMoments]:  # fmt: skip
    """Guided second moments of every linear, the last block first; `keep` puts them where they stay. `weights` is given
    each block's weights of the tokens, where they are wanted, just before."""
    kinds: list[Callable[[int], Collector]] = [
        partial(SecondMoments, kind="guided", device=model.device, output_groups=output_groups, keep=keep, power=power)
    ]
    if weights is not None:
        kinds.append(partial(TokenWeights, power=power))
    for moments, *others in guided_pass(model, tokens, kinds, folder, listener, processes, held):
        if weights is not None:
            weights(*others)
        yield moments


def guided_pass(
    model: BlockModel, tokens: Tensor, kinds: Sequence[Callable[[int], Collector]], folder: Path, listener: Listener,
    processes: Processes = ALONE, held: bool = False,
) -> Iterator[list[BlockMoments]]:  # fmt: skip
    """What each of `kinds` makes for the columns of every linear, of its inputs and the gradient by its outputs; the
    last block first. `folder` has what a stopped pass goes on from: the inputs of the blocks to come, and the gradient
    by the outputs of the next one. It is empty when all is done. `held`: by one process, all that is held in memory,
    and a stopped pass begins anew."""
    shards = sharded(tokens)
    mine, states = processes.mine(range(len(shards))), _States(folder, len(shards), held)
    for batch in {len(batch): batch for i in mine for batch in shards[i]}.values():
        model.start(batch)  # so that the model knows the blocks' other arguments, such as positions
    reached = processes.agreed(states.reached(len(model)))
    if reached is None:
        _keep_inputs(model, {i: shards[i] for i in mine}, states, listener)
        reached = len(model)
        processes.wait()
    model.let_go()
    indices = reversed(range(reached))
    while window := list(islice(indices, processes.count)):
        turns = enumerate(window)
        found = [_block_backward(model, index, states, kinds, processes, owner) for owner, index in turns]
        model.expect(window[-1] - 1)
        yield from (collected for collected in found if collected)
        # Only now: whoever asked for the moments has used them, so a stopped pass may go on below these blocks.
        processes.wait()
        if processes.first:
            states.leave(window)
    if processes.first:
        states.remove("gradient", 0)


def _keep_inputs(model: BlockModel, shards: dict[int, list[Tensor]], states: _States, listener: Listener) -> None:
    """Forward through all blocks, keeping the inputs of each; then the gradient by the last one's outputs."""
    listener.stage("Forward pass", len(model) * sum(len(ids) for ids in shards.values()))
    for shard, ids in shards.items():
        states.write("inputs", 0, shard, embed_batches(model, ids))
    for index, block in model.blocks():
        for shard in shards:
            hidden = states.read("inputs", index, shard)
            run_through(model, block, hidden, listener)
            states.write("inputs", index + 1, shard, hidden)
    for shard, ids in shards.items():
        pairs = zip(ids, states.read("inputs", len(model), shard), strict=True)
        states.write("gradient", len(model), shard, [_head_gradient(model, batch, state) for batch, state in pairs])
        states.remove("inputs", len(model), shard)


def _head_gradient(model: BlockModel, ids: Tensor, hidden: Tensor) -> Tensor:
    """Gradient, by the last block's outputs [batch, length, hidden], of the cross-entropy summed over all tokens; of an
    encoder, of its embeddings along random directions."""
    parts = []
    for sequence, states in zip(ids, hidden.to(model.device), strict=True):
        with torch.enable_grad():
            states.requires_grad_()
            end = _along_direction if model.architecture.encoder else _cross_entropy
            parts.append(torch.autograd.grad(end(model, sequence, states), states)[0])
    return torch.stack(parts).cpu()


def _cross_entropy(model: BlockModel, sequence: Tensor, states: Tensor) -> Tensor:
    """Summed over the tokens [length], predicted from states [length, hidden] after the last block."""
    logits = model.logits(states[:-1])
    return nn.functional.cross_entropy(logits, sequence[1:].to(model.device), reduction="sum")


def _along_direction(model: BlockModel, sequence: Tensor, states: Tensor) -> Tensor:
    """The embedding times a normal random vector: on average the square of its derivative by anything is the sum of
    those of the embedding's parts, and half of that is 1 - cosine, to second order. The sequence draws the vector."""
    draw = torch.Generator().manual_seed(int(sequence.sum()))
    direction = torch.randn(states.shape[-1], generator=draw).to(states.device)
    return model.embedding(states[None])[0] @ direction


def _block_backward(
    model: BlockModel, index: int, states: _States, kinds: Sequence[Callable[[int], Collector]], processes: Processes,
    owner: int,
) -> list[BlockMoments]:  # fmt: skip
    """Keeps the gradients by a block's inputs; returns what each kind makes of it to process `owner`."""
    block = model.block(index)
    with contextlib.ExitStack() as hooks:
        collectors = [hooks.enter_context(_guided_moments_of(block, model.linears(index), new)) for new in kinds]
        for shard, senders in processes.rounds(states.shards):
            if shard is not None:
                gradients = states.read("gradient", index + 1, shard)
                pairs = zip(states.read("inputs", index, shard), gradients, strict=True)
                passed = [_backward(model, block, *pair) for pair in pairs]
                states.write("gradient", index, shard, passed)
            for collector in collectors:
                for total in collector.values():
                    total.end_shard(processes, owner, senders)
    if owner != processes.rank:
        return []
    alone: list[dict[Group, Collector]] = [{(name,): total for name, total in each.items()} for each in collectors]
    return [(index, _hessians(each, model.architecture)) for each in alone]


def _backward(model: BlockModel, block: nn.Module, hidden: Tensor, gradient: Tensor) -> Tensor:
    """The gradient by a block's inputs, for the inputs and the gradient by the outputs, all [batch, length, hidden]."""
    with torch.enable_grad():
        hidden = hidden.to(model.device).requires_grad_()
        output = model.run(block, hidden)
    return torch.autograd.grad(output, hidden, gradient.to(model.device))[0].cpu()


@contextlib.contextmanager
def _guided_moments_of(
    block: nn.Module, names: list[str], new: Callable[[int], Collector]
) -> Iterator[dict[str, Collector]]:
    """While open, a backward pass through the block adds each linear's inputs, weighted by its outputs' gradients."""
    moments: dict[str, Collector] = {}
    handles = []
    for name in names:
        linear = linear_of(block, name)
        moments[name] = new(linear.in_features)

        def watch(_: nn.Module, arguments: tuple[Tensor], output: Tensor, total: Collector = moments[name]) -> None:
            inputs = arguments[0].detach()
            output.register_hook(lambda gradient: total.add(inputs, gradient))

        handles.append(linear.register_forward_hook(watch))
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


class _States:
    """Hidden states and gradients of all sequences, by block and shard: files on disk, or held in memory."""

    def __init__(self, folder: Path, shards: int, held: bool) -> None:
        self.folder, self.shards = folder, shards
        self._held: dict[Path, list[Tensor]] | None = {} if held else None

    def _path(self, kind: str, index: int, shard: int) -> Path:
        return self.folder / f"{kind}-{index}-{shard}.safetensors"

    def write(self, kind: str, index: int, shard: int, parts: list[Tensor]) -> None:
        path = self._path(kind, index, shard)
        if self._held is not None:
            self._held[path] = list(parts)
            return
        tensors = {f"{i:06}": part.contiguous() for i, part in enumerate(parts)}
        write_sealed(path, safetensors.torch.save(tensors, {"sha256": SEAL}))

    def read(self, kind: str, index: int, shard: int) -> list[Tensor]:
        path = self._path(kind, index, shard)
        if self._held is not None:
            return list(self._held[path])
        with open_tensors(path, "pt", AGAIN) as file:
            return [file.get_tensor(key) for key in sorted(file.keys())]

    def remove(self, kind: str, index: int, shard: int | None = None) -> None:
        """Remove a block's parts of a shard, or of all."""
        for each in range(self.shards) if shard is None else [shard]:
            path = self._path(kind, index, each)
            if self._held is None:
                path.unlink(missing_ok=True)
            else:
                self._held.pop(path, None)

    def leave(self, window: list[int]) -> None:
        """Remove what some blocks, the last first, needed. Their inputs stay until no gradient leads back to them."""
        for index in window:
            self.remove("gradient", index + 1)
        for index in window:
            self.remove("inputs", index)

    def reached(self, blocks: int) -> int | None:
        """The last block by whose inputs all gradients are there, or the number of blocks for those by the outputs of
        the last; None where the forward pass did not end."""
        for index in reversed(range(blocks + 1)):
            if all(self._path("gradient", index, shard).is_file() for shard in range(self.shards)):
                return index
        return None
