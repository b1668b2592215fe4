"""Smoothing (SmoothQuant, Xiao et al. 2022; AWQ, Lin et al. 2023): the columns of linears times s, and what gives them
their inputs over s, are the same model, and another one to quantize. Norms give inputs, and in a gated MLP the rows of
up_proj give those of down_proj.

llama.cpp rounds what enters a linear to 8 bits, 256 numbers together with K-quants, so that one large input takes the
bits of 255 others. So s is the input's size to a small power, which the weights hardly notice. It is rounded to a power
of two: the model stays the same to the bit, and a file tells what it was smoothed by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.architectures import architecture_of
from lqexport.models.interface import Weights
from lqexport.models.source import Source
from lqexport.storage.background import FileSpan, HasFileSpans

POWER = 0.2
"""Of the input's size."""
SEQUENCES = 8
"""Of the calibration's, from which the size of inputs is taken."""
TAKERS = {"attn_norm": ("attn_q", "attn_k", "attn_v", "attn_qkv"), "ffn_norm": ("ffn_gate", "ffn_up")}
"""By their names in GGUF: which linears a norm gives the inputs of."""
GATED = ("ffn_gate", "ffn_up", "ffn_down")
"""A gated MLP: the last one's inputs are multiples of what the second gives."""


@dataclass(frozen=True)
class Pair:
    """A norm or linear of a block, as a module, and the weights of the linears that it alone gives the inputs of."""

    giver: str
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
        if all(name in modules for name in GATED):
            found.append(Pair(f"{block}.{modules['ffn_up']}", (f"{block}.{modules['ffn_down']}.weight",)))
    return found


def column_scales(magnitudes: Tensor, power: float = POWER) -> Tensor:
    """s of every column, a power of two, float32 [C], for the mean |x_i| [C] of what enters; 1 where nothing does."""
    wanted = power * magnitudes.double().cpu().log2()
    used = wanted.isfinite()
    return torch.where(used, wanted - wanted[used].mean(), 0.0).round().exp2().float()


def scales_between(source: Weights, smoothed: Weights) -> dict[Pair, Tensor]:
    """The scales by which a model was smoothed, from its norms, and where those tell of any from the sizes of rows.
    What tuning and rounding move by less than a factor of 1.4 does not matter. Pairs with none but ones are left
    out."""
    architecture, known = architecture_of(source.config), set(source.names()) & set(smoothed.names())
    found: dict[Pair, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for pair in pairs(architecture, int(source.config["num_hidden_layers"])):
        name = f"{pair.giver}.weight"
        if name not in known or source.shape(name) != smoothed.shape(name) or (_is_linear(source, name) and not found):
            continue
        sizes = [
            _sizes(weights.read(name).float() * scale, architecture.norm_plus).log2()
            for weights, scale in ((source, columns.get(name, 1.0)), (smoothed, 1.0))
        ]
        scales = (sizes[0] - sizes[1]).round().nan_to_num(0, 0, 0).exp2().float()
        if bool((scales != 1).any()):
            found[pair] = scales
            columns |= dict.fromkeys(pair.takers, scales)
    return found


def _is_linear(weights: Weights, name: str) -> bool:
    return len(weights.shape(name)) == 2


def _sizes(values: Tensor, plus: float) -> Tensor:
    """Of a norm's gains, to which `plus` is added, or of a linear's rows: float64 [n]."""
    return (values.double() + plus).abs() if values.ndim == 1 else values.norm(dim=1).double()


class Smoothed:
    """A model with the scales s [C] of some pairs moved from what gives inputs into the columns of what takes them.
    What is changed is read as float32."""

    def __init__(self, source: Source, scales: Mapping[Pair, Tensor]) -> None:
        self._source, self.name, self.fingerprint, self.config = source, source.name, source.fingerprint, source.config
        self._plus = architecture_of(source.config).norm_plus
        self._columns = {taker: scale for pair, scale in scales.items() for taker in pair.takers}
        kinds = ("weight", "bias")
        self._given = {f"{pair.giver}.{kind}": scale for pair, scale in scales.items() for kind in kinds}

    def names(self) -> list[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def read(self, name: str) -> Tensor:
        values = self._source.read(name)
        if name in self._given:
            plus = self._plus if values.ndim == 1 and name.endswith(".weight") else 0.0
            scale = self._given[name]
            values = (values.float() + plus) / (scale if values.ndim == 1 else scale[:, None]) - plus
        return values.float() * self._columns[name] if name in self._columns else values

    def file_spans(self, name: str) -> list[FileSpan]:
        return self._source.file_spans(name) if isinstance(self._source, HasFileSpans) else []

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._source.tokenizer()

    def copy_model_files(self, folder: Path) -> None:
        self._source.copy_model_files(folder)
