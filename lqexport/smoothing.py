"""Smoothing (SmoothQuant, Xiao et al. 2022; AWQ, Lin et al. 2023): the columns of linears times s, and the norm that
gives their inputs over s, are the same model, and another one to quantize.

llama.cpp rounds what enters a linear to 8 bits, 256 numbers together with K-quants, so that one large input takes the
bits of 255 others. So s is the input's size to a small power, which the weights hardly notice. It is rounded to a power
of two: the model stays the same to the bit, and a file's norms tell what it was smoothed by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lqexport.background import Place, Placed
from lqexport.converters.architecture import Architecture
from lqexport.converters.architectures import architecture_of
from lqexport.source import Source
from lqexport.weights import Weights

POWER = 0.2
"""Of the input's size."""
SEQUENCES = 8
"""Of the calibration's, from which the size of inputs is taken."""
TAKERS = {"attn_norm": ("attn_q", "attn_k", "attn_v", "attn_qkv"), "ffn_norm": ("ffn_gate", "ffn_up")}
"""By their names in GGUF: which linears a norm gives the inputs of."""


@dataclass(frozen=True)
class Pair:
    """A norm of a block, as a module, and the weights of the linears that it alone gives the inputs of."""

    norm: str
    takers: tuple[str, ...]


def pairs(architecture: Architecture, layers: int) -> list[Pair]:
    """Those of all blocks. None where one norm serves attention and MLP, where there are experts, and of encoders,
    whose norms give hidden states too."""
    modules = {gguf: module for module, gguf in architecture.gguf_block.items()}
    shared = "ffn_norm" not in modules or "attn_norm_2" in modules
    if shared or architecture.experts or architecture.encoder:
        return []
    found = []
    for block in (f"{architecture.blocks}.{layer}" for layer in range(layers)):
        for norm, takers in TAKERS.items():
            names = tuple(f"{block}.{modules[taker]}.weight" for taker in takers if taker in modules)
            found.append(Pair(f"{block}.{modules[norm]}", names))
    return found


def column_scales(magnitudes: Tensor, power: float = POWER) -> Tensor:
    """s of every column, a power of two, float32 [C], for the mean |x_i| [C] of what enters; 1 where nothing does."""
    wanted = power * magnitudes.double().cpu().log2()
    used = wanted.isfinite()
    return torch.where(used, wanted - wanted[used].mean(), 0.0).round().exp2().float()


def scales_between(source: Weights, smoothed: Weights) -> dict[Pair, Tensor]:
    """The scales by which a model was smoothed, from its norms; those that tuning has moved by less than a factor of
    1.4 do not matter. Pairs with none but ones are left out."""
    architecture, known = architecture_of(source.config), set(source.names()) & set(smoothed.names())
    plus, found = architecture.norm_plus, {}
    for pair in pairs(architecture, int(source.config["num_hidden_layers"])):
        if (name := f"{pair.norm}.weight") in known and source.shape(name) == smoothed.shape(name):
            sizes = [(weights.read(name).double() + plus).abs().log2() for weights in (source, smoothed)]
            scales = (sizes[0] - sizes[1]).round().nan_to_num(0, 0, 0).exp2().float()
            if bool((scales != 1).any()):
                found[pair] = scales
    return found


class Smoothed:
    """A model with the scales s [C] of some pairs moved from their norms into the linears' columns. What is changed is
    read as float32."""

    def __init__(self, source: Source, scales: Mapping[Pair, Tensor]) -> None:
        self._source, self.name, self.fingerprint, self.config = source, source.name, source.fingerprint, source.config
        self._plus = architecture_of(source.config).norm_plus
        self._times: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor] = {}
        for pair, scale in scales.items():
            self._times |= dict.fromkeys(pair.takers, scale)
            self._norms |= {f"{pair.norm}.{kind}": scale for kind in ("weight", "bias")}

    def names(self) -> list[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def read(self, name: str) -> Tensor:
        values = self._source.read(name)
        if name in self._times:
            return values.float() * self._times[name]
        if name in self._norms:
            plus = self._plus if name.endswith(".weight") else 0
            return (values.float() + plus) / self._norms[name] - plus
        return values

    def places(self, name: str) -> list[Place]:
        return self._source.places(name) if isinstance(self._source, Placed) else []

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._source.tokenizer()

    def copy_model_files(self, folder: Path) -> None:
        self._source.copy_model_files(folder)
