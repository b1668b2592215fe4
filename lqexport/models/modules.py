"""Builds transformers' model of a config.json without storage, with a linear for every matrix that is quantized.

transformers keeps the experts of a block in one stacked tensor, and some architectures keep transposed weights, or one
linear for what GGUF files hold as two. All are replaced by linears, so that each has a name and a weight [rows,
columns] of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Mistral4Config,
    Mistral4ForCausalLM,
    PreTrainedModel,
)
from transformers.integrations.moe import _default_apply_gate
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from lqexport.converters.models.architecture import Architecture, Order
from lqexport.converters.models.architectures import architecture_of, normalized
from lqexport.converters.models.hf_defaults import options_of
from lqexport.converters.models.tensor_names import as_matrix, expert_number, head_count, projection_shapes
from lqexport.converters.models.value_heads import TILED, tiled_columns
from lqexport.errors import UserError

Gate = Callable[[Tensor, Tensor], Tensor]
"""Returns the inputs of an expert's last linear, from the outputs of gate_proj and of up_proj."""

# transformers 5.23 knows Mistral 4 alone only as the text part of a model with images.
AutoModelForCausalLM.register(Mistral4Config, Mistral4ForCausalLM, exist_ok=True)


class _Unset(nn.Linear):
    """A linear without storage, whose weights come from a checkpoint.

    PyTorch would draw numbers for it. Without storage these are none, but to draw them takes longer than all the rest,
    and a model may have 50000 experts.
    """

    def reset_parameters(self) -> None:
        """Leaves the weights as they are."""


class Expert(nn.Module):
    """One expert: a gated MLP."""

    def __init__(self, hidden: int, inner: int, gate: Gate, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = _Unset(hidden, inner, bias=bias, dtype=dtype)
        self.up_proj = _Unset(hidden, inner, bias=bias, dtype=dtype)
        self.down_proj = _Unset(inner, hidden, bias=bias, dtype=dtype)
        self.gate = gate

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.gate(self.gate_proj(hidden), self.up_proj(hidden)))


class UngatedExpert(nn.Module):
    """One expert: an MLP without a gate and without biases."""

    def __init__(self, hidden: int, inner: int, activation: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.up_proj = _Unset(hidden, inner, bias=False, dtype=dtype)
        self.down_proj = _Unset(inner, hidden, bias=False, dtype=dtype)
        self.activation = activation

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(hidden)))


class Experts(nn.ModuleList):
    """The experts of a block as separate modules; each processes the tokens that are routed to it.

    Replaces transformers' module, which has the weights of all experts in one tensor [experts, 2 * inner, hidden], or
    transposed.

    only   the numbers of the experts that run; the outputs of the others are left out. None for all
    """

    only: Collection[int] | None = None

    def __init__(self, stacked: Any) -> None:
        if not getattr(stacked, "has_gate", True):
            inner, hidden = stacked.up_proj.shape[1:]
            dtype = stacked.up_proj.dtype
            super().__init__(UngatedExpert(hidden, inner, stacked.act_fn, dtype) for _ in stacked.up_proj)
            return
        weights, bias = stacked.gate_up_proj, getattr(stacked, "has_bias", False)
        # Llama 4's module says nothing of its weights. They are transposed.
        transposed = getattr(stacked, "is_transposed", True)
        hidden, inner = weights.shape[1:] if transposed else weights.shape[:0:-1]
        gate = _gate(stacked)
        super().__init__(Expert(hidden, inner // 2, gate, bias, weights.dtype) for _ in weights)

    def forward(self, hidden: Tensor, chosen: Tensor, routing_weights: Tensor) -> Tensor:
        """Returns the sum of the chosen experts' outputs, times their routing weights: [tokens, hidden].

        hidden            the inputs [tokens, hidden]
        chosen            the numbers of the chosen experts [tokens, chosen experts]
        routing_weights   their weights, of the same shape
        """
        total = torch.zeros_like(hidden)
        for number in range(len(self)) if self.only is None else self.only:
            tokens, places = torch.where(chosen == number)
            if len(tokens):
                output = self[number](hidden[tokens]) * routing_weights[tokens, places, None]
                total = total.index_add(0, tokens, output.to(total.dtype))
        return total


class ExpertsOfWeighedInputs(Experts):
    """The experts of a block of Llama 4, whose inputs and not their outputs are multiplied by the routing weights."""

    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]  # as transformers' module is called
        """Returns each expert's outputs [experts * tokens, hidden], 0 for the tokens that are not routed to it.

        hidden   the inputs of each expert [experts * tokens, hidden]: all tokens times their routing weights, which are
                 0 for other experts
        """
        inputs = hidden.unflatten(0, (len(self), -1))
        outputs = [torch.zeros_like(part) for part in inputs]
        for number in range(len(self)) if self.only is None else self.only:
            (tokens,) = torch.where(inputs[number].any(dim=-1))
            if len(tokens):
                output = self[number](inputs[number][tokens])
                outputs[number] = outputs[number].index_copy(0, tokens, output.to(hidden.dtype))
        return torch.cat(outputs)


def _gate(stacked: Any) -> Gate:
    """Returns what transformers' module of all experts computes between its two products."""
    method = getattr(type(stacked), "_apply_gate", _default_apply_gate)
    if method is _default_apply_gate:
        activation = stacked.act_fn
        return lambda gate, up: activation(gate) * up
    # The method reads only settings of the module.
    settings = copy.copy(stacked)
    settings._parameters = {}
    if getattr(stacked, "is_concatenated", True):
        return lambda gate, up: settings._apply_gate(torch.cat((gate, up), dim=-1))
    # Its rows of gate_proj and of up_proj take turns.
    return lambda gate, up: settings._apply_gate(torch.stack((gate, up), dim=-1).flatten(-2))


class Turned(nn.Linear):
    """A linear whose weight is transposed, group of outputs by group: [groups * inputs, outputs of a group].

    groups   the number of groups
    """

    def __init__(self, inputs: int, outputs: int, groups: int, dtype: torch.dtype) -> None:
        super().__init__(outputs // groups, groups * inputs, bias=False, dtype=dtype)
        self._groups = groups

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns the outputs [..., groups * outputs of a group], from inputs [..., inputs]."""
        return hidden @ self.weight.unflatten(0, (self._groups, -1)).transpose(0, 1).flatten(1)


class Parts(nn.Module):
    """The linears that take the place of a fused linear, and compute its outputs together.

    rows     the name of each of them, and the numbers of its rows in the fused linear
    turned   name -> number of groups, for those whose weight is transposed
    """

    def __init__(self, fused: nn.Linear, rows: Mapping[str, Order], turned: Mapping[str, int]) -> None:
        super().__init__()
        for name, numbers in rows.items():
            sizes, dtype = (fused.in_features, len(numbers)), fused.weight.dtype
            groups = turned.get(name)
            linear = Turned(*sizes, groups, dtype) if groups else nn.Linear(*sizes, bias=False, dtype=dtype)
            self.add_module(name, linear)
        self._order = np.argsort(np.concatenate(list(rows.values())))

    def forward(self, hidden: Tensor) -> Tensor:
        outputs = torch.cat([linear(hidden) for linear in self.children()], dim=-1)
        return outputs[..., torch.from_numpy(self._order).to(outputs.device)]


class ConvolutionParts(nn.Module):
    """Convolutions over single channels that take the place of one over the channels of all of them.

    rows   the name of each of them, and the numbers of its channels, which follow those of the one before
    """

    bias = None

    def __init__(self, whole: nn.Conv1d, rows: Mapping[str, Order]) -> None:
        super().__init__()
        for name, numbers in rows.items():
            part = nn.Module()
            form = (len(numbers), *whole.weight.shape[1:])
            part.weight = nn.Parameter(whole.weight.new_empty(form))
            self.add_module(name, part)

    @property
    def weight(self) -> Tensor:
        """The weights [channels, 1, width] of all of them. transformers reads them and does not call the module."""
        return torch.cat([cast(Tensor, part.weight) for part in self.children()])


def _in_order(order: Order) -> Callable[..., Tensor]:
    """Returns a hook that puts the columns of a linear's inputs into an order before the linear is computed."""

    def before(_: nn.Module, arguments: tuple[Tensor, ...]) -> Tensor:
        return arguments[0][..., torch.from_numpy(order).to(arguments[0].device)]

    return before


def run_only(block: nn.Module, experts: Collection[int]) -> None:
    """Makes the block run only the given experts."""
    for module in block.modules():
        if isinstance(module, Experts):
            module.only = experts


def meta_model(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Returns transformers' model of a config, with parameters and buffers on the "meta" device.

    Tensors are named as in the table of architectures. Raises UserError if transformers makes no model of the config.
    """
    config = normalized(config)
    architecture = architecture_of(config)
    with torch.device("meta"):
        model = _made_by_transformers(config, AutoModel if architecture.encoder else AutoModelForCausalLM, dtype)
        for block in model.get_submodule(architecture.blocks).children():
            _replace_by_linears(block, architecture, config)
            if config.get(TILED):
                _tile_inputs(block, architecture, config)
    return model


def _made_by_transformers(config: dict[str, Any], auto_class: Any, dtype: torch.dtype) -> PreTrainedModel:
    try:
        hf_config = AutoConfig.for_model(**options_of(config))
        return auto_class.from_config(hf_config, dtype=dtype, trust_remote_code=False).eval()
    except Exception as error:  # each model's code raises exceptions of its own for a config that it refuses
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"transformers can make no model of config.json ({type(error).__name__}: {reason}).") from error


def _replace_by_linears(block: nn.Module, architecture: Architecture, config: dict[str, Any]) -> None:
    if architecture.experts:
        # `mlp.experts.0.gate_proj` -> `mlp.experts`. The first blocks may have no experts.
        linear = next(name for group in architecture.linears for name in group if expert_number(name) is not None)
        name = linear.partition("experts.")[0] + "experts"
        if name in dict(block.named_modules()):
            stacked = block.get_submodule(name)
            is_llama4 = isinstance(stacked, Llama4TextExperts)
            block.set_submodule(name, (ExpertsOfWeighedInputs if is_llama4 else Experts)(stacked))
    for name in architecture.transposed:
        stored = block.get_submodule(name).weight
        assert isinstance(stored, Tensor)
        inputs, outputs = stored.shape
        block.set_submodule(name, nn.Linear(inputs, outputs, dtype=stored.dtype))
    for name, rows_of in architecture.parts.items():
        fused = dict(block.named_modules()).get(name)
        if isinstance(fused, nn.Conv1d):
            block.set_submodule(name, ConvolutionParts(fused, rows_of(config)))
        elif isinstance(fused, nn.Linear):
            rows = rows_of(config)
            keys = {part: architecture.turned.get(f"{name}.{part}") for part in rows}
            turned = {part: head_count(config, key) for part, key in keys.items() if key}
            block.set_submodule(name, Parts(fused, rows, turned))


def _tile_inputs(block: nn.Module, architecture: Architecture, config: dict[str, Any]) -> None:
    """Makes linears whose columns are in llama.cpp's order take their inputs in that order."""
    for name in architecture.tiled:
        if isinstance(linear := dict(block.named_modules()).get(name), nn.Linear):
            weight = f"{architecture.blocks}.0.{name}.weight"
            if (order := tiled_columns(architecture, config, weight, linear.in_features)) is not None:
                linear.register_forward_pre_hook(_in_order(order))


def compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Allocates and computes the buffers that follow from the config and are in no checkpoint (rotary frequencies)."""
    allocated = []
    for module in model.modules():
        buffers = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in buffers:
            setattr(module, name, torch.empty_like(getattr(module, name), device=device))
        allocated += [module] * bool(buffers)
    # A whole model may compute the buffers of its blocks (Falcon-H1).
    for module in (*allocated, *(module for module in model.modules() if isinstance(module, PreTrainedModel))):
        (module if isinstance(module, PreTrainedModel) else model)._init_weights(module)


def expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the name and shape of every tensor that transformers' model of a config stores.

    A tied output layer is left out. An encoder's `projections` come last; they are no part of transformers' model.
    Raises UserError as `meta_model` does.
    """
    model = meta_model(config)
    stored = model.state_dict().keys()
    tensors = chain(model.named_parameters(), model.named_buffers())
    shapes = {name: as_matrix(tuple(tensor.shape)) for name, tensor in tensors if name in stored}
    return shapes | projection_shapes(architecture_of(config), config)
