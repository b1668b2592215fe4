"""Guided second moments: the calibration sequences forward through all decoder blocks, whose inputs are kept, then the
gradient of the loss back through them, the last block first. Each block is run again, with gradients, when its turn
comes. Inputs are those of the full-precision blocks before; one block's weights are in memory, and of the sequences'
hidden states those of one shard."""

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
    model: BlockModel, tokens: Tensor, output_groups: int, folder: Path, listener: Listener,
    processes: Processes = ALONE, keep: Keep = in_place, held: bool = False, power: float = 1.0,
    weights: Callable[[BlockMoments], None] | None = None, parts: int = 1,
) -> Iterator[BlockMoments]:  # fmt: skip
    """Guided second moments of every linear, the last block first, each in up to `parts` parts; `keep` puts them where
    they stay. `weights` is given each block's weights of the tokens, where they are wanted, just before."""
    kinds: list[Callable[[int], Collector]] = [
        partial(SecondMoments, kind="guided", device=model.device, output_groups=output_groups, keep=keep, power=power)
    ]
    if weights is not None:
        kinds.append(partial(TokenWeights, power=power))
    for moments, *others in guided_pass(model, tokens, kinds, folder, listener, processes, held, parts):
        if weights is not None:
            weights(*others)
        yield moments


def guided_pass(
    model: BlockModel, tokens: Tensor, kinds: Sequence[Callable[[int], Collector]], folder: Path, listener: Listener,
    processes: Processes = ALONE, held: bool = False, parts: int = 1,
) -> Iterator[list[BlockMoments]]:  # fmt: skip
    """What each of `kinds` makes for the columns of every linear, of its inputs and the gradient by its outputs; the
    last block first, each in up to `parts` parts. `folder` has what a stopped pass goes on from: the inputs of the
    blocks to come, and the gradient by the outputs of the next one. It is empty when all is done. `held`: by one
    process, all that is held in memory, and a stopped pass begins anew."""
    shards = sharded(tokens)
    mine, states = processes.share_of(range(len(shards))), _States(folder, len(shards), held)
    for batch in {len(batch): batch for i in mine for batch in shards[i]}.values():
        model.start(batch)  # so that the model knows the blocks' other arguments, such as positions
    reached = processes.from_first(states.reached(len(model)))
    if reached is None:
        _keep_inputs(model, {i: shards[i] for i in mine}, states, listener)
        reached = len(model)
        processes.wait()
    model.let_go()
    for window in windows(reversed(range(reached)), processes):
        blocks = [[_collector(model, index, parts, new) for new in kinds] for index in window]
        count = max(len(collector.parts) for collectors in blocks for collector in collectors)
        for number in range(count):
            for owner, collectors in enumerate(blocks):
                if number < len(collectors[0].parts):
                    _pass_back(model, collectors, number, states, processes, owner)
            first = blocks[0][0]
            if number + 1 < len(first.parts):
                model.expect(first.index, first.alone(number + 1))
            else:
                model.expect(window[-1] - 1)
            if processes.rank < len(blocks):
                yield [collector.moments() for collector in blocks[processes.rank]]
        # Only now: whoever asked for the moments has used them, so a stopped pass may go on below these blocks.
        processes.wait()
        if processes.first:
            states.leave(window)
    if processes.first:
        states.remove("gradient", 0)


def _collector(model: BlockModel, index: int, parts: int, new: Callable[[int], Collector]) -> BlockCollector:
    """Of every linear by itself."""
    alone = [(name,) for name in model.linears(index)]
    return BlockCollector(model.architecture, index, alone, alone, parts, new)


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


def _pass_back(
    model: BlockModel, collectors: list[BlockCollector], number: int, states: _States, processes: Processes, owner: int
) -> None:
    """Collects part `number` of a block for the owner; with the first, keeps the gradients by the block's inputs."""
    (index,) = {collector.index for collector in collectors}
    block = model.block(index, collectors[0].alone(number))
    with contextlib.ExitStack() as hooks:
        for collector in collectors:
            hooks.enter_context(collector.collecting(block, number, _inputs_and_gradient))
        for shard, senders in processes.rounds(states.shards):
            if shard is not None:
                gradients = states.read("gradient", index + 1, shard)
                pairs = zip(states.read("inputs", index, shard), gradients, strict=True)
                passed = [_backward(model, block, *pair) for pair in pairs]
                if number == 0:  # already then: blocks of other processes go on from them
                    states.write("gradient", index, shard, passed)
            for collector in collectors:
                collector.end_shard(processes, owner, senders)


def _inputs_and_gradient(linear: nn.Linear, add: Callable[[Tensor, Tensor], None]) -> RemovableHandle:
    """While there, a backward pass gives `add` the linear's inputs and the gradient by its outputs."""

    def watch(_: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
        inputs = arguments[0].detach()
        output.register_hook(lambda gradient: add(inputs, gradient))

    return linear.register_forward_hook(watch)


def _backward(model: BlockModel, block: nn.Module, hidden: Tensor, gradient: Tensor) -> Tensor:
    """The gradient by a block's inputs, for the inputs and the gradient by the outputs, all [batch, length, hidden]."""
    with torch.enable_grad():
        hidden = hidden.to(model.device).requires_grad_()
        output = model.run(block, hidden)
    return torch.autograd.grad(output, hidden, gradient.to(model.device))[0].cpu()


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
