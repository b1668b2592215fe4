"""Collecting second moments over the calibration sequences, decoder block by decoder block.

`forward_moments` needs one forward pass and yields the first block first. `guided_moments` adds a backward pass of the
summed cross-entropy and yields the last block first: it keeps the inputs of every block on disk, and runs each block
again, with gradients, when its turn comes. Both hold one block's weights and the sequences' hidden states in memory,
and take the inputs of every block from the full-precision blocks before it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from lqexport.artifact import written_whole
from lqexport.blocks import BlockModel
from lqexport.moments import SecondMoments
from lqexport.progress import Listener, Silent
from lqexport.recipe import Moments

BATCH_TOKENS = 1024
"""Tokens in one forward pass on the CPU; larger batches are no faster there and take more memory."""
GPU_BATCH_TOKENS = 8192

Group = tuple[str, ...]
"""Names of linears in a block that share their second moments."""
BlockMoments = tuple[int, dict[Group, Tensor]]
"""A block's index and the second moments of its linears, as `SecondMoments.hessian` gives them."""


def batches(tokens: Tensor, device: torch.device) -> list[Tensor]:
    """Token ids [samples, length] in runs that one forward pass takes."""
    budget = BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS
    return list(tokens.split(max(1, budget // tokens.shape[1])))


def embed(model: BlockModel, tokens: Tensor) -> list[Tensor]:
    """Hidden states that enter the first block, a batch at a time, kept on the host."""
    return [model.start(batch).cpu() for batch in batches(tokens, model.device)]


def forward_moments(
    model: BlockModel, inputs: list[Tensor], kind: Moments, wanted: Callable[[int, Group], bool], last: int
) -> Iterator[BlockMoments]:
    """Plain or normalized second moments of the wanted groups, up to block `last`; `inputs` end as its outputs."""
    for index, block in model.blocks():
        if index > last:
            return
        groups = [group for group in model.architecture.linears if wanted(index, group)]
        with moments_of(block, groups, lambda columns: SecondMoments(columns, kind, model.device)) as moments:
            run_through(model, block, inputs)
        yield index, {group: total.hessian() for group, total in moments.items()}


def input_magnitudes(model: BlockModel, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Largest mean |x_i| of any sequence at every linear's inputs, float32 [C] by the weight's name: L2QER's profile of
    the full-precision model. `inputs` end as the last block's outputs."""
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def before(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            largest = arguments[0].float().abs().mean(1).amax(0)
            found[name] = found[name].maximum(largest) if name in found else largest

        return before

    for index, block in model.blocks():
        for linear in (linear for group in model.architecture.linears for linear in group):
            linear_of(block, linear).register_forward_pre_hook(watch(model.weight_name(index, linear)))
        run_through(model, block, inputs)
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


def input_of(model: BlockModel, block: nn.Module, linear: str, hidden: Tensor) -> Tensor:
    """What enters a linear when the block runs on `hidden`; of an expert, the tokens that are routed to it."""
    caught: list[Tensor] = []
    handle = linear_of(block, linear).register_forward_pre_hook(lambda _, arguments: caught.append(arguments[0]))
    try:
        model.run(block, hidden.to(model.device))
    finally:
        handle.remove()
    return caught[0] if caught else hidden.new_empty(0, linear_of(block, linear).in_features)


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
    model: BlockModel, tokens: Tensor, output_groups: int, folder: Path, listener: Listener
) -> Iterator[BlockMoments]:
    """Guided second moments of every linear, the last block first. `folder` keeps what a stopped pass goes on from: the
    inputs of the blocks to come, and the gradient by the outputs of the next one. It is empty when all is done."""
    ids, states = batches(tokens, model.device), _States(folder)
    for batch in {len(batch): batch for batch in ids}.values():
        model.start(batch)  # so that the model knows the blocks' other arguments, such as positions
    reached = states.reached(len(model))
    if reached is None:
        _keep_inputs(model, ids, states, listener)
        reached = len(model)
    for index in reversed(range(reached)):
        moments, gradients = _block_backward(model, index, states, output_groups)
        yield index, moments
        # Only now: whoever asked for the moments has used them, so a stopped pass may go on below this block.
        states.write("gradient", index, gradients)
        states.remove("gradient", index + 1)
        states.remove("inputs", index)
    states.remove("gradient", 0)


def _keep_inputs(model: BlockModel, ids: list[Tensor], states: _States, listener: Listener) -> None:
    """Forward through all blocks, keeping the inputs of each; then the gradient by the last one's outputs."""
    listener.stage("Forward pass", len(model) * len(ids))
    hidden = [model.start(batch).cpu() for batch in ids]
    for index, block in model.blocks():
        states.write("inputs", index, hidden)
        run_through(model, block, hidden, listener)
    gradients = [_head_gradient(model, batch, state) for batch, state in zip(ids, hidden, strict=True)]
    states.write("gradient", len(model), gradients)


def _head_gradient(model: BlockModel, ids: Tensor, hidden: Tensor) -> Tensor:
    """Gradient, by the last block's outputs [batch, length, hidden], of the cross-entropy summed over all tokens."""
    parts = []
    for sequence, states in zip(ids, hidden.to(model.device), strict=True):
        with torch.enable_grad():
            states.requires_grad_()
            logits = model.logits(states[:-1])
            loss = nn.functional.cross_entropy(logits, sequence[1:].to(model.device), reduction="sum")
            parts.append(torch.autograd.grad(loss, states)[0])
    return torch.stack(parts).cpu()


def _block_backward(
    model: BlockModel, index: int, states: _States, output_groups: int
) -> tuple[dict[Group, Tensor], list[Tensor]]:
    """A block's guided second moments, and the gradients by its inputs."""
    block, gradients = model.block(index), states.read("gradient", index + 1)
    names = [name for group in model.architecture.linears for name in group]
    with _guided_moments_of(block, names, output_groups, model.device) as moments:
        for i, batch in enumerate(states.read("inputs", index)):
            with torch.enable_grad():
                hidden = batch.to(model.device).requires_grad_()
                output = model.run(block, hidden)
            gradients[i] = torch.autograd.grad(output, hidden, gradients[i].to(model.device))[0].cpu()
    return {(name,): total.hessian() for name, total in moments.items()}, gradients


@contextlib.contextmanager
def _guided_moments_of(
    block: nn.Module, names: list[str], output_groups: int, device: torch.device
) -> Iterator[dict[str, SecondMoments]]:
    """While open, a backward pass through the block adds each linear's inputs, weighted by its outputs' gradients."""
    moments: dict[str, SecondMoments] = {}
    handles = []
    for name in names:
        linear = linear_of(block, name)
        moments[name] = SecondMoments(linear.in_features, "guided", device, output_groups)

        def watch(_: nn.Module, arguments: tuple[Tensor], output: Tensor, total: SecondMoments = moments[name]) -> None:
            inputs = arguments[0].detach()
            output.register_hook(lambda gradient: total.add(inputs, gradient))

        handles.append(linear.register_forward_hook(watch))
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


class _States:
    """Hidden states and gradients of all sequences on disk, a file for each block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, kind: str, index: int) -> Path:
        return self.folder / f"{kind}-{index}.safetensors"

    def write(self, kind: str, index: int, parts: list[Tensor]) -> None:
        content = safetensors.torch.save({f"{i:06}": part.contiguous() for i, part in enumerate(parts)})
        with written_whole(self._path(kind, index)) as file:
            file.write(content)

    def read(self, kind: str, index: int) -> list[Tensor]:
        with safe_open(self._path(kind, index), "pt") as file:
            return [file.get_tensor(key) for key in sorted(file.keys())]

    def remove(self, kind: str, index: int) -> None:
        self._path(kind, index).unlink(missing_ok=True)

    def reached(self, blocks: int) -> int | None:
        """The block by whose inputs the last kept gradient is; None where the forward pass did not end."""
        return next((index for index in range(blocks + 1) if self._path("gradient", index).is_file()), None)
