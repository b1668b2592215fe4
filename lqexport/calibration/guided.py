"""Collects guided second moments: a forward pass, then a backward pass block by block (GuidedQuant).

The forward pass takes the calibration sequences through the full-precision model and keeps the inputs of every block.
The backward pass takes the gradient of the loss back, the last block first, and runs each block again with gradients.
In memory are one block's weights and the hidden states of one shard.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lqexport.calibration.block_collector import BlockCollector, BlockMoments, Collector
from lqexport.calibration.collect import embed_batches, run_through, sharded, windows
from lqexport.calibration.moments import SecondMoments, TokenWeights
from lqexport.errors import AGAIN
from lqexport.models.blocks import BlockModel
from lqexport.runtime.placement import Keep, in_place
from lqexport.runtime.processes import ALONE, Processes
from lqexport.runtime.progress import Listener
from lqexport.storage.tensor_files import SEAL, open_tensors, write_sealed


def guided_moments(
    model: BlockModel, tokens: Tensor, *, output_groups: int, folder: Path, listener: Listener,
    processes: Processes = ALONE, keep: Keep = in_place, held: bool = False, power: float = 1.0,
    weights: Callable[[BlockMoments], None] | None = None, parts: int = 1,
) -> Iterator[BlockMoments]:  # fmt: skip
    """Yields the guided second moments of every linear, the last block first, each in at most `parts` parts.

    power     the power of the tokens' weights (see `SecondMoments`)
    keep      puts second moments where they stay
    weights   is called with a block's weights of the tokens just before its second moments are yielded, if given

    The other arguments are those of `guided_pass`.
    """
    collector_types: list[Callable[[int], Collector]] = [
        partial(
            SecondMoments,
            moments_type="guided",
            device=model.device,
            output_groups=output_groups,
            keep=keep,
            power=power,
        )
    ]
    if weights is not None:
        collector_types.append(partial(TokenWeights, power=power))
    for moments, *others in guided_pass(
        model, tokens, collector_types, folder=folder, listener=listener, processes=processes, held=held, parts=parts
    ):
        if weights is not None:
            weights(*others)
        yield moments


def guided_pass(
    model: BlockModel, tokens: Tensor, collector_types: Sequence[Callable[[int], Collector]], *, folder: Path,
    listener: Listener, processes: Processes = ALONE, held: bool = False, parts: int = 1,
) -> Iterator[list[BlockMoments]]:  # fmt: skip
    """Yields, block by block and the last one first, what each type of collector has collected.

    tokens            token ids, int64 [samples, length]
    collector_types   each makes a collector for a number of columns; collectors get a linear's inputs and the gradient
                      with respect to its outputs
    folder            what a stopped pass goes on from: the inputs of the blocks that are left, and the gradient with
                      respect to the outputs of the next one; empty when all is done
    held              keeps all of this in memory instead, for one process; a stopped pass then starts from the
                      beginning
    parts             a block comes in at most so many parts (see `BlockCollector`)

    Raises UserError if a file in `folder` is damaged.
    """
    shards = sharded(tokens)
    shard_numbers, states = processes.share_of(range(len(shards))), _States(folder, len(shards), held)
    for batch in {len(batch): batch for i in shard_numbers for batch in shards[i]}.values():
        model.start(batch)  # so that the model knows the blocks' other arguments, such as positions
    reached = processes.from_first(states.reached(len(model)))
    if reached is None:
        _keep_inputs(model, {i: shards[i] for i in shard_numbers}, states, listener)
        reached = len(model)
        processes.wait()
    model.let_go()
    for window in windows(reversed(range(reached)), processes):
        blocks = [[_collector(model, index, parts, new) for new in collector_types] for index in window]
        count = max(len(collector.parts) for collectors in blocks for collector in collectors)
        for number in range(count):
            for owner, collectors in enumerate(blocks):
                if number < len(collectors[0].parts):
                    _pass_back(model, collectors, number, states, processes, owner)
            first = blocks[0][0]
            if number + 1 < len(first.parts):
                model.expect(first.index, first.experts_needed(number + 1))
            else:
                model.expect(window[-1] - 1)
            if processes.rank < len(blocks):
                yield [collector.moments() for collector in blocks[processes.rank]]
        # Not before: now the caller has used the moments, so a stopped pass may go on with the blocks before these.
        processes.wait()
        if processes.first:
            states.leave(window)
    if processes.first:
        states.remove("gradient", 0)


def _collector(model: BlockModel, index: int, parts: int, new: Callable[[int], Collector]) -> BlockCollector:
    """Returns a collector in which every linear is a group by itself."""
    groups = [(name,) for name in model.linears(index)]
    return BlockCollector(model.architecture, index, groups, groups, parts, new)


def _keep_inputs(model: BlockModel, shards: dict[int, list[Tensor]], states: _States, listener: Listener) -> None:
    """Keeps the inputs of all blocks in a forward pass, and then the gradient of the last block's outputs."""
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
    """Returns the gradient of the loss with respect to the last block's outputs, [batch, length, hidden], on the host.

    The loss is the cross-entropy summed over all tokens; for an encoder, its embeddings along random directions.
    """
    parts = []
    for sequence, states in zip(ids, hidden.to(model.device), strict=True):
        with torch.enable_grad():
            states.requires_grad_()
            end = _along_direction if model.architecture.encoder else _cross_entropy
            parts.append(torch.autograd.grad(end(model, sequence, states), states)[0])
    return torch.stack(parts).cpu()


def _cross_entropy(model: BlockModel, sequence: Tensor, states: Tensor) -> Tensor:
    """Returns the cross-entropy summed over a sequence [length], from states [length, hidden] after all blocks."""
    logits = model.logits(states[:-1])
    return nn.functional.cross_entropy(logits, sequence[1:].to(model.device), reduction="sum")


def _along_direction(model: BlockModel, sequence: Tensor, states: Tensor) -> Tensor:
    """Returns a sequence's embedding times a normal random vector, which the sequence itself seeds.

    On average, the squared derivative of this product is the sum of the squared derivatives of the embedding's parts.
    To second order, 1 - cosine is half of that sum.
    """
    draw = torch.Generator().manual_seed(int(sequence.sum()))
    direction = torch.randn(states.shape[-1], generator=draw).to(states.device)
    return model.embedding(states[None])[0] @ direction


def _pass_back(
    model: BlockModel, collectors: list[BlockCollector], number: int, states: _States, processes: Processes, owner: int
) -> None:
    """Collects part `number` of a block for the process `owner`.

    With the first part, it also keeps the gradients with respect to the block's inputs.
    """
    (index,) = {collector.index for collector in collectors}
    block = model.block(index, collectors[0].experts_needed(number))
    outputs = _Outputs()
    with contextlib.ExitStack() as hooks:
        for collector in collectors:
            hooks.enter_context(collector.collecting(block, number, outputs.watch))
        for shard, senders in processes.rounds(states.shards):
            if shard is not None:
                gradients = states.read("gradient", index + 1, shard)
                pairs = zip(states.read("inputs", index, shard), gradients, strict=True)
                passed = [_backward(model, block, outputs, *pair) for pair in pairs]
                if number == 0:  # not after the last part: the blocks of other processes go on from these
                    states.write("gradient", index, shard, passed)
            for collector in collectors:
                collector.end_shard(processes, owner, senders)


class _Outputs:
    """The outputs of watched linears, which are added with their inputs once their gradient is known.

    Outputs that only choose, such as the tokens to attend to, have no gradient. The inputs of their linears weigh the
    same.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[list[Tensor], tuple[int, ...], Callable[[Tensor, Tensor], None]]] = []

    def watch(self, linear: nn.Linear, add: Callable[[Tensor, Tensor], None]) -> RemovableHandle:
        """Registers a hook: a backward pass calls `add` with the linear's inputs and the gradient of its outputs."""

        def after(_: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
            inputs = [arguments[0].detach()]
            self._waiting.append((inputs, tuple(output.shape), add))
            if output.requires_grad:
                output.register_hook(lambda gradient: add(inputs.pop(), gradient))

        return linear.register_forward_hook(after)

    def end(self) -> None:
        """Ends a backward pass: adds what has had no gradient."""
        waiting, self._waiting = self._waiting, []
        for inputs, shape, add in waiting:
            for each in inputs:
                add(each, each.new_ones(shape))


def _backward(model: BlockModel, block: nn.Module, outputs: _Outputs, hidden: Tensor, gradient: Tensor) -> Tensor:
    """Returns the gradient with respect to a block's inputs, from its inputs and the gradient of its outputs.

    All are [batch, length, hidden]. `outputs` are those of the block's linears.
    """
    with torch.enable_grad():
        hidden = hidden.to(model.device).requires_grad_()
        output = model.run(block, hidden)
    passed = torch.autograd.grad(output, hidden, gradient.to(model.device))[0].cpu()
    outputs.end()
    return passed


class _States:
    """The hidden states and gradients of all sequences, by block and shard, in files or in memory.

    The names are "inputs" for the inputs of a block, and "gradient" for the gradient with respect to them.
    """

    def __init__(self, folder: Path, shards: int, held: bool) -> None:
        self.folder, self.shards = folder, shards
        self._held: dict[Path, list[Tensor]] | None = {} if held else None

    def _path(self, name: str, index: int, shard: int) -> Path:
        return self.folder / f"{name}-{index}-{shard}.safetensors"

    def write(self, name: str, index: int, shard: int, parts: list[Tensor]) -> None:
        path = self._path(name, index, shard)
        if self._held is not None:
            self._held[path] = list(parts)
            return
        tensors = {f"{i:06}": part.contiguous() for i, part in enumerate(parts)}
        write_sealed(path, safetensors.torch.save(tensors, {"sha256": SEAL}))

    def read(self, name: str, index: int, shard: int) -> list[Tensor]:
        path = self._path(name, index, shard)
        if self._held is not None:
            return list(self._held[path])
        with open_tensors(path, "pt", AGAIN) as file:
            return [file.get_tensor(key) for key in sorted(file.keys())]

    def remove(self, name: str, index: int, shard: int | None = None) -> None:
        """Removes what a block has of a shard, or of all shards."""
        for each in range(self.shards) if shard is None else [shard]:
            path = self._path(name, index, each)
            if self._held is None:
                path.unlink(missing_ok=True)
            else:
                self._held.pop(path, None)

    def leave(self, window: list[int]) -> None:
        """Removes what the blocks of a window needed: all gradients first, since inputs must outlive gradients."""
        for index in window:
            self.remove("gradient", index + 1)
        for index in window:
            self.remove("inputs", index)

    def reached(self, blocks: int) -> int | None:
        """Returns the last block whose inputs have a gradient in every shard.

        It is the number of blocks if only the outputs of the last block have one, and None if the forward pass is not
        complete.
        """
        for index in reversed(range(blocks + 1)):
            if all(self._path("gradient", index, shard).is_file() for shard in range(self.shards)):
                return index
        return None
