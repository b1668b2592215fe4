"""Runs a model one decoder block at a time, so that only one block's weights are in memory.

The modules are transformers' own, created without storage (on the "meta" device). Each block gets its weights when it
is used.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from lqexport.converters.models.architecture import FIRST
from lqexport.converters.models.architectures import architecture_of
from lqexport.converters.models.tensor_names import expert_number
from lqexport.errors import UserError
from lqexport.models.carried import Arguments, hidden_in, states_of
from lqexport.models.interface import Weights
from lqexport.models.modules import compute_buffers, meta_model, run_only
from lqexport.models.streams import AltUp, HyperConnections, Streams
from lqexport.storage.background import read_ahead


class _LastBlockCalled(Exception):
    """Stops the model once the last block has been called."""


class _Replacing(nn.Module):
    """A module in the place of another one, with its attributes: some models read numbers or types of masks there."""

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        self._replaced = [replaced]  # in a list, so that torch does not register it as a submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._replaced[0], name)


class _ArgumentRecorder(_Replacing):
    """Replaces a decoder block, and records the hidden states and the other arguments that the block is called with."""

    def __init__(self, block: nn.Module, last: bool, passed: Callable[[Any], Any]) -> None:
        super().__init__(block)
        self.last, self._passed = last, passed

    def forward(self, hidden: Any, *positional: Any, **named: Any) -> Any:
        self.hidden, self.arguments = hidden, (positional, named)
        if self.last:
            raise _LastBlockCalled
        return self._passed(hidden)


class _BodyOutput(tuple[torch.Tensor]):
    """The output of the modules below the output layer: hidden states; every optional output is None."""

    @property
    def last_hidden_state(self) -> torch.Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


class _FixedBody(_Replacing):
    """Replaces the modules below the output layer, and returns given hidden states for any input."""

    def __init__(self, states: torch.Tensor, body: nn.Module) -> None:
        super().__init__(body)
        self._output = _BodyOutput((states,))

    def forward(self, *_: Any, **__: Any) -> _BodyOutput:
        return self._output


def linear_of(block: nn.Module, name: str) -> nn.Linear:
    """Returns the linear `name` of a decoder block."""
    linear = block.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def _is_of(name: str, experts: Collection[int] | None) -> bool:
    """Returns whether a tensor belongs to one of the given experts, or to no expert. None stands for all experts."""
    return experts is None or expert_number(name) in (None, *experts)


def _empty(module: nn.Module) -> None:
    """Drops a module's weights, even if the module itself is still referenced."""
    module.load_state_dict({key: value.to("meta") for key, value in module.state_dict().items()}, assign=True)


def _leave_out_biases(model: nn.Module, present: set[str]) -> None:
    """Takes biases of linears and norms that the weights do not have out of a model: transformers sets them to 0."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None and f"{name}.bias" not in present:
            module.register_parameter("bias", None)


def _rounded_by(rounding: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def before(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return rounding(arguments[0])

    return before


class BlockModel:
    """A model whose embedding, decoder blocks and output layer are each loaded when they are used.

    dtype           of the hidden states and of all weights that `compute_dtype` does not apply to
    rounding        applied to the inputs of every linear of a block; None to leave them as they are
    compute_dtype   of the blocks' matrix products (autocast); None: `dtype`. The weights of the linears are kept in it,
                    since autocast would convert them to it

    Raises UserError if the architecture is unknown or transformers makes no model of the config.
    """

    def __init__(
        self,
        weights: Weights,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        rounding: Callable[[torch.Tensor], torch.Tensor] | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        self.weights = weights
        self.device = torch.device(device)
        self.dtype = dtype
        self.rounding = rounding
        self._compute_dtype = compute_dtype or dtype
        self.architecture = architecture_of(weights.config)
        self._model = meta_model(weights.config, dtype)
        _leave_out_biases(self._model, set(weights.names()))
        compute_buffers(self._model, self.device)
        self._body_name = self.architecture.blocks.rpartition(".")[0]
        self._body = self._model.get_submodule(self._body_name)
        self._blocks = cast(nn.ModuleList, self._model.get_submodule(self.architecture.blocks))
        self._streams = self._made_streams()
        self._hidden = int(weights.config["hidden_size"]) * (self._streams.count if self._streams else 1)
        self._states = states_of(self.architecture, self._hidden, self._blocks)
        self._arguments: dict[tuple[int, int], list[Arguments]] = {}

    def _made_streams(self) -> Streams | None:
        if (key := self.architecture.streams) is None:
            return None
        count, merging = int(self.weights.config[key]), self.architecture.merging
        is_list = isinstance(self._model.get_submodule(merging), nn.ModuleList)
        return AltUp(count, merging) if is_list else HyperConnections(count, merging)

    def __len__(self) -> int:
        return len(self._blocks)

    @torch.no_grad()
    def start(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the hidden states [batch, length, hidden] that enter the first block, for token ids [batch, length].

        In some models they have more columns up to the last block: further hidden states (`streams.py`), and what
        blocks get beside these (`carried.py`), which `hidden_of` leaves out.
        Also records, for this batch shape, the other arguments of every block (masks, positions), which `run` needs.
        Raises UserError if the embedding has no row for a token.
        """
        self._check_ids(ids)
        for name in self._embeddings():
            self._loaded(name)
        last, passed = len(self) - 1, self._states.passed
        recorders = [_ArgumentRecorder(block, index == last, passed) for index, block in enumerate(self._blocks)]
        self._model.set_submodule(self.architecture.blocks, nn.ModuleList(recorders))
        with contextlib.suppress(_LastBlockCalled):
            self._model(ids.to(self.device), use_cache=False)
        self._model.set_submodule(self.architecture.blocks, self._blocks)
        hidden = self._streams.joined(recorders[0].hidden) if self._streams else recorders[0].hidden
        states, arguments = self._states.start(hidden, [recorder.arguments for recorder in recorders])
        self._arguments[(ids.shape[0], ids.shape[1])] = arguments
        return states

    def hidden_of(self, states: torch.Tensor) -> torch.Tensor:
        """Returns the hidden states alone of what `start` or `run` returns: all that a token has."""
        return states[..., : self._hidden]

    def _check_ids(self, ids: torch.Tensor) -> None:
        rows = self.weights.shape(self.architecture.embedding)[0]
        if ids.numel() and (last := int(ids.max())) >= rows:
            raise UserError(
                f"The tokenizer makes the token {last} of the text, and the model's embedding has {rows} rows: the "
                "tokenizer is another model's, or has tokens that this model lacks."
            )

    def _embeddings(self) -> list[str]:
        """Returns the names of the modules before the first block: token embedding, and learned position embedding."""
        output = self.architecture.output.removesuffix("weight")
        after_blocks = (self.architecture.final_norm, output, *self.architecture.projections)
        names = [name for name in self.architecture.gguf_top if not name.startswith(after_blocks)]
        return list(dict.fromkeys(name.rpartition(".")[0] for name in names))

    def let_go(self) -> None:
        """Drops the weights of the embeddings and the output layer from memory. They are read again when needed."""
        output = [] if self.architecture.encoder else [self.architecture.output.removesuffix(".weight")]
        for name in [*self._embeddings(), *output]:
            _empty(self._model.get_submodule(name))

    def expect(self, index: int, experts: Collection[int] | None = None) -> None:
        """Starts reading block `index` from disk in the background, since it is needed next.

        experts   the numbers of the experts to read; None for all

        Does nothing if there is no such block.
        """
        if 0 <= index < len(self):
            read_ahead(self.weights, [name for name in self.names(index) if _is_of(name, experts)])

    def block(self, index: int, experts: Collection[int] | None = None) -> nn.Module:
        """Returns decoder block `index` with its weights on the device.

        experts   the numbers of the experts to read and run; None for all. The others have no weights and do not run

        Raises UserError if a tensor is missing or does not fit.
        """
        block = copy.deepcopy(self._blocks[index])
        prefix = f"{self.architecture.blocks}.{index}"
        names = {parameter: f"{prefix}.{parameter}" for parameter in block.state_dict() if _is_of(parameter, experts)}
        self._fill(block, names, self.multiplied(index))
        if experts is not None:
            run_only(block, experts)
        block.number = index  # type: ignore[assignment]  # `run` looks up the block's other arguments by it
        if self.rounding is not None:
            for name in self.linears(index):
                block.get_submodule(name).register_forward_pre_hook(_rounded_by(self.rounding))
        return block

    def blocks(self, first: int = 0) -> Iterator[tuple[int, nn.Module]]:
        """Yields (index, block) for every block from `first` on, with its weights.

        A block's weights are dropped before the next one.
        """
        for index in range(first, len(self)):
            block = self.block(index)
            yield index, block
            _empty(block)

    def run(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the hidden states [batch, length, hidden] after `block`.

        `start` must have been called with the same batch shape before.
        """
        with self.autocast():
            return self.forward(block, hidden)

    def forward(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Returns what `run` returns. The caller has entered `autocast`."""
        return self._run(cast(int, block.number), hidden, block)

    def _run(self, index: int, hidden: torch.Tensor, call: Callable[..., Any]) -> torch.Tensor:
        """Returns the hidden states after block `index`, whose modules `call` runs."""
        arguments = self._arguments[(hidden.shape[0], hidden.shape[1])][index]
        return self._states.run(index, hidden, arguments, self._with_streams(call))

    def _with_streams(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function that runs a block on states [batch, length, columns], of all hidden states of a token."""
        if (streams := self._streams) is None:
            return call
        return lambda states, *positional, **named: streams.joined(
            hidden_in(call(streams.apart(states), *positional, **named))
        )

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Returns the context in which blocks run: autocast to `compute_dtype`, if that is not the model's dtype."""
        if self._compute_dtype == self.dtype:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self._compute_dtype)

    def linears(self, index: int) -> list[str]:
        """Returns the names of the linears of decoder block `index`, relative to the block."""
        return [linear for group in self.architecture.linears_of(index) for linear in group]

    def multiplied(self, index: int) -> dict[str, torch.dtype]:
        """Returns the dtype in which each weight of a linear of decoder block `index` is kept.

        The keys are the weights' names relative to the block.
        """
        return {f"{linear}.weight": self._compute_dtype for linear in self.linears(index)}

    def weight_name(self, index: int, linear: str) -> str:
        """Returns the full name of the weight of the linear `linear` of decoder block `index`."""
        return f"{self.architecture.blocks}.{index}.{linear}.weight"

    def names(self, index: int) -> list[str]:
        """Returns the full names of all tensors of decoder block `index`."""
        return [f"{self.architecture.blocks}.{index}.{name}" for name in self._blocks[index].state_dict()]

    def run_as(self, index: int, state: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        """Returns the hidden states after block `index`, as `run` does, but with the weights in `state`.

        The keys of `state` are parameter names relative to the block.
        """
        block = self._blocks[index]
        with self.autocast():
            return self._run(
                index, hidden, lambda *positional, **named: torch.func.functional_call(block, state, positional, named)
            )

    def normed(self, hidden: torch.Tensor, norm_state: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Returns hidden states [..., hidden] after the final norm: the input of the output layer.

        hidden       the hidden states after the last block, all that a token has
        norm_state   weights that replace those of the final norm; None for the model's own
        """
        hidden = self._streams.merged(hidden, self._loaded) if self._streams else hidden
        norm = self._loaded(self.architecture.final_norm)
        return norm(hidden) if norm_state is None else torch.func.functional_call(norm, norm_state, (hidden,))

    def logits(self, hidden: torch.Tensor, norm_state: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Returns the logits [..., vocabulary] for hidden states after the last block; arguments as of `normed`."""
        self._load_output()
        states = self.normed(hidden, norm_state)
        # The model itself computes the logits, since it may scale or cap them. It takes three dimensions, and some
        # models look at the shape of the token ids.
        states = states.reshape(1, -1, states.shape[-1])
        self._model.set_submodule(self._body_name, _FixedBody(states, self._body))
        logits = self._model(torch.zeros(states.shape[:2], dtype=torch.int64, device=self.device)).logits
        self._model.set_submodule(self._body_name, self._body)
        return logits.reshape(*hidden.shape[:-1], -1)

    def _load_output(self) -> None:
        """Reads the weights of the output layer, which may be those of the embedding."""
        tied = self.architecture.output not in self.weights.names()
        self._loaded(self.architecture.output.removesuffix(".weight"), self.architecture.embedding if tied else None)

    def whole(self) -> PreTrainedModel:
        """Returns transformers' model of a decoder with all of its weights on the device, in `dtype`."""
        for name in (*self._embeddings(), self.architecture.final_norm):
            self._loaded(name)
        self._load_output()
        for index, block in enumerate(self._blocks):
            prefix = f"{self.architecture.blocks}.{index}"
            self._fill(block, {name: f"{prefix}.{name}" for name in block.state_dict()}, {})
        return self._model

    def embedding(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns an encoder's embeddings [batch, hidden], normalized to length 1.

        hidden   the hidden states [batch, length, hidden] after the last block
        """
        if self.architecture.pools_normed:
            hidden = self.normed(hidden)
        pooled = hidden[:, 0] if self.weights.config.get("pooling_type") == FIRST else hidden.mean(1)
        for projection in self._projections:
            pooled = pooled @ projection.T
        return nn.functional.normalize(pooled, dim=1)

    @functools.cached_property
    def _projections(self) -> list[torch.Tensor]:
        """An encoder's `projections` [rows, columns], in the order in which they are applied."""
        present = set(self.weights.names())
        names = [name for name in self.architecture.projections if name in present]
        return [self.weights.read(name).to(self.device, self.dtype) for name in names]

    def _loaded(self, name: str, weight: str | None = None) -> nn.Module:
        """Returns a module outside the blocks with its weights on the device.

        weight   the tensor to use if the module shares another module's weight (tied embeddings); None for its own
        """
        module = self._model.get_submodule(name)
        if next(module.parameters()).is_meta:
            names = {parameter: f"{name}.{parameter}" for parameter in module.state_dict()}
            self._fill(module, names if weight is None else {"weight": weight}, {})
        return module

    def _fill(self, module: nn.Module, names: dict[str, str], dtypes: dict[str, torch.dtype]) -> None:
        """Loads a module's weights. Parameters that are not in `names` stay without storage.

        names    the name of the tensor of each parameter
        dtypes   the dtypes of those parameters that are not kept in `self.dtype`

        Raises UserError if a tensor's shape is not the parameter's.
        """
        parameters = module.state_dict()
        all_dtypes = {
            parameter: dtypes.get(parameter, self.dtype) if stored.is_floating_point() else stored.dtype
            for parameter, stored in parameters.items()
        }
        state = {key: self.weights.read(name).to(self.device, all_dtypes[key]) for key, name in names.items()}
        for key, tensor in state.items():
            if [size for size in parameters[key].shape if size > 1] == [size for size in tensor.shape if size > 1]:
                # A convolution over single channels is a matrix [channels, width] here, and [channels, 1, width] there.
                state[key] = tensor.reshape(parameters[key].shape)
            else:
                raise UserError(
                    f"{names[key]} has the shape {list(tensor.shape)}, where by config.json it is "
                    f"{list(parameters[key].shape)}. Copy or download the model again."
                )
        module.load_state_dict(state, assign=True, strict=False)
        module.requires_grad_(False)
