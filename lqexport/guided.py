"""Guided second moments: the calibration sequences forward through all decoder blocks, whose inputs are kept, then the
gradient of the loss back through them, the last block first. Each block is run again, with gradients, when its turn
comes. Inputs are those of the full-precision blocks before; one block's weights are in memory, and of the sequences'
hidden states those of one shard."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from lqexport.blocks import BlockModel
from lqexport.collect import BlockMoments, Collector, embed_batches, hessians, linear_of, run_through, sharded
from lqexport.errors import AGAIN
from lqexport.factor import Keep, in_place
from lqexport.moments import Group, SecondMoments, TokenWeights
from lqexport.processes import ALONE, Processes
from lqexport.progress import Listener
from lqexport.tensor_files import SEAL, open_tensors, write_sealed


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
    return [(index, hessians(each, model.architecture)) for each in alone]


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
