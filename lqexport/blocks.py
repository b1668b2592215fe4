"""A model run decoder block by decoder block, so that only one block's weights are in memory.

The modules are transformers' own, made without storage ("meta"); each block gets its weights when its turn comes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lqexport.converters.architectures import architecture_of
from lqexport.weights import Weights


class _Caught(Exception):
    """Stops the model once the first block has been called."""


class _Catcher(nn.Module):
    """Stands where the decoder blocks are and keeps what the first would have been called with."""

    def forward(self, hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.hidden, self.arguments = hidden, arguments
        raise _Caught


def _rounded_by(rounding: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def before(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return rounding(arguments[0])

    return before


class BlockModel:
    """Embedding, decoder blocks and head of a model, each loaded when it is used.

    rounding        what the inputs of the blocks' linears go through first; None to leave them as they are
    compute_dtype   what the blocks' matrix products are computed in (autocast), if not in `dtype`, in which weights,
                    hidden states and the output layer stay
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
        options = {key: value for key, value in weights.config.items() if key != "quantization_config"}
        config = AutoConfig.for_model(**options)
        with torch.device("meta"):
            self._model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        self._body = self._model.get_submodule(self.architecture.blocks.rpartition(".")[0])
        self._blocks = self._model.get_submodule(self.architecture.blocks)
        # Its tables are computed, not loaded, so it is made anew with storage.
        self._body.rotary_emb = type(self._body.rotary_emb)(config=config).to(self.device)
        self._head: torch.Tensor | None = None
        self._arguments: dict[tuple[int, int], dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    @torch.no_grad()
    def start(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [batch, length, hidden] that enter the first block, for token ids [batch, length]."""
        embedding = self._body.get_input_embeddings()
        if embedding.weight.device.type == "meta":
            self._load(embedding, self.architecture.embedding.removesuffix(".weight"))
        catcher = _Catcher()
        self._body.layers = nn.ModuleList([catcher])
        with contextlib.suppress(_Caught):
            self._model(ids.to(self.device), use_cache=False)
        self._body.layers = self._blocks
        self._arguments[(ids.shape[0], ids.shape[1])] = catcher.arguments
        return catcher.hidden

    def let_go(self) -> None:
        """Drop the weights of the embedding and the output; they are read again when they are used."""
        self._head = None
        embedding = self._body.get_input_embeddings()
        embedding.weight = nn.Parameter(torch.empty_like(embedding.weight, device="meta"), requires_grad=False)

    def block(self, index: int) -> nn.Module:
        """Decoder block `index` with its weights on the device."""
        block = copy.deepcopy(self._blocks[index])
        self._load(block, f"{self.architecture.blocks}.{index}")
        if self.rounding is not None:
            for name in (name for group in self.architecture.linears for name in group):
                block.get_submodule(name).register_forward_pre_hook(_rounded_by(self.rounding))
        return block

    def blocks(self) -> Iterator[tuple[int, nn.Module]]:
        """Every block with its weights, one at a time."""
        for index in range(len(self)):
            yield index, self.block(index)

    def run(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states after `block`; `start` must have seen the same batch shape before."""
        with self._autocast():
            output = block(hidden, **self._arguments[(hidden.shape[0], hidden.shape[1])])
        return output[0] if isinstance(output, tuple) else output

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self._compute_dtype == self.dtype:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self._compute_dtype)

    def weight_name(self, index: int, linear: str) -> str:
        """Name of the weight of a linear of decoder block `index`."""
        return f"{self.architecture.blocks}.{index}.{linear}.weight"

    def names(self, index: int) -> list[str]:
        """Names of the tensors of decoder block `index`."""
        return [f"{self.architecture.blocks}.{index}.{name}" for name in self._blocks[index].state_dict()]

    def run_as(self, index: int, state: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        """`run` of block `index` with the weights of `state`, by the names of its own parameters."""
        arguments = self._arguments[(hidden.shape[0], hidden.shape[1])]
        with self._autocast():
            output = torch.func.functional_call(self._blocks[index], state, (hidden,), arguments)
        return output[0] if isinstance(output, tuple) else output

    def normed(self, hidden: torch.Tensor, norm_state: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        """What the output layer takes for hidden states [..., hidden] after the last block; with `norm_state`, by a
        final norm of those weights."""
        norm = self._model.get_submodule(self.architecture.final_norm)
        if next(norm.parameters()).device.type == "meta":
            self._load(norm, self.architecture.final_norm)
        return norm(hidden) if norm_state is None else torch.func.functional_call(norm, norm_state, (hidden,))

    def logits(self, hidden: torch.Tensor, norm_state: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Logits [..., vocabulary] for the same."""
        if self._head is None:
            tied = self.architecture.output not in self.weights.names()
            self._head = self._read(self.architecture.embedding if tied else self.architecture.output)
        return self.normed(hidden, norm_state) @ self._head.T

    def _read(self, name: str) -> torch.Tensor:
        return self.weights.read(name).to(self.device, self.dtype)

    def _load(self, module: nn.Module, prefix: str) -> None:
        state = {name: self._read(f"{prefix}.{name}") for name in module.state_dict()}
        module.load_state_dict(state, assign=True)
        module.requires_grad_(False)
