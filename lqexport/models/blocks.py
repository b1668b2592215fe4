"""A model run decoder block by decoder block, so that only one block's weights are in memory.

The modules are transformers' own, made without storage ("meta"); each block gets its weights when its turn comes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator
from typing import Any, cast

import torch
from torch import nn

from lqexport.converters.models.architecture import FIRST
from lqexport.converters.models.architectures import architecture_of
from lqexport.converters.models.tensor_names import expert_number
from lqexport.errors import UserError
from lqexport.models.interface import Weights
from lqexport.models.modules import compute_buffers, meta_model, run_only
from lqexport.storage.background import read_ahead

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Caught(Exception):
    """Stops the model once the last block has been called."""


class _Catcher(nn.Module):
    """Stands where a decoder block is and keeps what that would have been called with beside the hidden states."""

    def __init__(self, block: nn.Module, last: bool) -> None:
        super().__init__()
        self._kept, self.last = [block], last  # in a list, so that it is no submodule

    def __getattr__(self, name: str) -> Any:
        # Some models ask a block which mask it wants.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._kept[0], name)

    def forward(self, hidden: Any, *positional: Any, **named: Any) -> tuple[Any]:
        self.hidden, self.arguments = hidden, (positional, named)
        if self.last:
            raise _Caught
        # Models that expect a tensor hand this tuple on to the next catcher.
        return (hidden,)


class _States(tuple[torch.Tensor]):
    """What the part of a model below the output layer returns: hidden states, and nothing of what else it could."""

    @property
    def last_hidden_state(self) -> torch.Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


class _Given(nn.Module):
    """Stands where the part below the output layer is."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self._states = _States((states,))

    def forward(self, *_: Any, **__: Any) -> _States:
        return self._states


def linear_of(block: nn.Module, name: str) -> nn.Linear:
    """The linear of that name in a decoder block."""
    linear = block.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def _is_of(name: str, experts: Collection[int] | None) -> bool:
    """Whether a tensor belongs to one of these experts, or to none."""
    return experts is None or expert_number(name) in (None, *experts)


def _empty(module: nn.Module) -> None:
    """Drop a module's weights, whoever still holds it."""
    module.load_state_dict({key: value.to("meta") for key, value in module.state_dict().items()}, assign=True)


def _rounded_by(rounding: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def before(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return rounding(arguments[0])

    return before


class BlockModel:
    """Embedding, decoder blocks and head of a model, each loaded when it is used.

    rounding        what the inputs of the blocks' linears go through first; None to leave them as they are
    compute_dtype   what the blocks' matrix products are computed in (autocast), if not in `dtype`, in which hidden
                    states and all other weights stay. The linears' weights are kept in it, as autocast would make them
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
        compute_buffers(self._model, self.device)
        self._body_name = self.architecture.blocks.rpartition(".")[0]
        self._body = self._model.get_submodule(self._body_name)
        self._blocks = cast(nn.ModuleList, self._model.get_submodule(self.architecture.blocks))
        self._arguments: dict[tuple[int, int], list[_Arguments]] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    @torch.no_grad()
    def start(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [batch, length, hidden] that enter the first block, for token ids [batch, length]."""
        for name in self._embeddings():
            self._loaded(name)
        catchers = [_Catcher(block, index == len(self) - 1) for index, block in enumerate(self._blocks)]
        self._model.set_submodule(self.architecture.blocks, nn.ModuleList(catchers))
        with contextlib.suppress(_Caught):
            self._model(ids.to(self.device), use_cache=False)
        self._model.set_submodule(self.architecture.blocks, self._blocks)
        self._arguments[(ids.shape[0], ids.shape[1])] = [catcher.arguments for catcher in catchers]
        return catchers[0].hidden

    def _embeddings(self) -> list[str]:
        """Modules that the hidden states come from: of tokens, and of positions where they are learned."""
        others = (self.architecture.final_norm, self.architecture.output)
        names = [name for name in self.architecture.gguf_top if not name.startswith(others)]
        return list(dict.fromkeys(name.rpartition(".")[0] for name in names))

    def let_go(self) -> None:
        """Drop the weights of the embedding and the output; they are read again when they are used."""
        output = [] if self.architecture.encoder else [self.architecture.output.removesuffix(".weight")]
        for name in [*self._embeddings(), *output]:
            _empty(self._model.get_submodule(name))

    def expect(self, index: int, experts: Collection[int] | None = None) -> None:
        """Have block `index`, if there is one, read from disk in the background: it comes next."""
        if 0 <= index < len(self):
            read_ahead(self.weights, [name for name in self.names(index) if _is_of(name, experts)])

    def block(self, index: int, experts: Collection[int] | None = None) -> nn.Module:
        """Decoder block `index` with its weights on the device; of its experts these alone, where they are given: no
        others are read or run."""
        block = copy.deepcopy(self._blocks[index])
        prefix = f"{self.architecture.blocks}.{index}"
        names = {own: f"{prefix}.{own}" for own in block.state_dict() if _is_of(own, experts)}
        self._fill(block, names, self.multiplied(index))
        if experts is not None:
            run_only(block, experts)
        block.number = index  # type: ignore[assignment]  # by which `run` finds the other arguments
        if self.rounding is not None:
            for name in self.linears(index):
                block.get_submodule(name).register_forward_pre_hook(_rounded_by(self.rounding))
        return block

    def blocks(self) -> Iterator[tuple[int, nn.Module]]:
        """Every block with its weights, one at a time: those of one are gone when the next is asked for."""
        for index in range(len(self)):
            block = self.block(index)
            yield index, block
            _empty(block)

    def run(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states after `block`; `start` must have seen the same batch shape before."""
        positional, named = self._arguments[(hidden.shape[0], hidden.shape[1])][cast(int, block.number)]
        with self._autocast():
            output = block(hidden, *positional, **named)
        return output[0] if isinstance(output, tuple) else output

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self._compute_dtype == self.dtype:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self._compute_dtype)

    def linears(self, index: int) -> list[str]:
        """Names, within the block, of the linears of decoder block `index`."""
        return [linear for group in self.architecture.linears_of(index) for linear in group]

    def multiplied(self, index: int) -> dict[str, torch.dtype]:
        """The dtype that the weights of the linears of decoder block `index` are kept in, by their names within it."""
        return {f"{linear}.weight": self._compute_dtype for linear in self.linears(index)}

    def weight_name(self, index: int, linear: str) -> str:
        """Name of the weight of a linear of decoder block `index`."""
        return f"{self.architecture.blocks}.{index}.{linear}.weight"

    def names(self, index: int) -> list[str]:
        """Names of the tensors of decoder block `index`."""
        return [f"{self.architecture.blocks}.{index}.{name}" for name in self._blocks[index].state_dict()]

    def run_as(self, index: int, state: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        """`run` of block `index` with the weights of `state`, by the names of its own parameters."""
        positional, named = self._arguments[(hidden.shape[0], hidden.shape[1])][index]
        with self._autocast():
            output = torch.func.functional_call(self._blocks[index], state, (hidden, *positional), named)
        return output[0] if isinstance(output, tuple) else output

    def normed(self, hidden: torch.Tensor, norm_state: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        """What the output layer takes for hidden states [..., hidden] after the last block; with `norm_state`, by a
        final norm of those weights."""
        norm = self._loaded(self.architecture.final_norm)
        return norm(hidden) if norm_state is None else torch.func.functional_call(norm, norm_state, (hidden,))

    def logits(self, hidden: torch.Tensor, norm_state: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Logits [..., vocabulary] for the same."""
        tied = self.architecture.output not in self.weights.names()
        self._loaded(self.architecture.output.removesuffix(".weight"), self.architecture.embedding if tied else None)
        states = self.normed(hidden, norm_state)
        # By the model itself, which may scale or cap them; it wants three dimensions.
        self._model.set_submodule(self._body_name, _Given(states.reshape(1, -1, states.shape[-1])))
        logits = self._model(input_ids=None).logits
        self._model.set_submodule(self._body_name, self._body)
        return logits.reshape(*states.shape[:-1], -1)

    def embedding(self, hidden: torch.Tensor) -> torch.Tensor:
        """What an encoder gives for hidden states [batch, length, hidden] after the last block: [batch, hidden], of
        length 1."""
        pooled = hidden[:, 0] if self.weights.config.get("pooling_type") == FIRST else hidden.mean(1)
        return nn.functional.normalize(pooled, dim=1)

    def _loaded(self, name: str, weight: str | None = None) -> nn.Module:
        """A module outside the blocks with its weights on the device; `weight` is the tensor where it is another's."""
        module = self._model.get_submodule(name)
        if next(module.parameters()).is_meta:
            own = {key: f"{name}.{key}" for key in module.state_dict()}
            self._fill(module, own if weight is None else {"weight": weight}, {})
        return module

    def _fill(self, module: nn.Module, names: dict[str, str], dtypes: dict[str, torch.dtype]) -> None:
        """Give a module its weights: tensors by the names of its parameters, some in a dtype of their own; what is not
        named stays without. Raises UserError where they do not fit."""
        wanted = {own: dtypes.get(own, self.dtype) for own in names}
        state = {own: self.weights.read(name).to(self.device, wanted[own]) for own, name in names.items()}
        parameters = module.state_dict()
        for own, tensor in state.items():
            if tensor.shape != parameters[own].shape:
                raise UserError(
                    f"{names[own]} has the shape {list(tensor.shape)}, where by config.json it is "
                    f"{list(parameters[own].shape)}. Copy or download the model again."
                )
        module.load_state_dict(state, assign=True, strict=False)
        module.requires_grad_(False)
