"""Smoothing (SmoothQuant, Xiao et al. 2022; AWQ, Lin et al. 2023): scales columns of a linear before quantization.

The columns of a linear are multiplied by s, and the module that computes its inputs is divided by s. The model stays
the same function, but its inputs round better. The inputs come from a norm; in a gated MLP, the inputs of down_proj
come from the rows of up_proj.

llama.cpp rounds the inputs of a linear to 8 bits, with K-quants 256 numbers together, so that one large input takes
precision from 255 others. So s is the mean size of the input to a small power, which hardly changes how the weights
round. It is rounded to a power of two: then the model is the same to the bit, and the scales can be found again in the
written file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.architectures import architecture_of
from lqexport.models.interface import Weights
from lqexport.models.source import Source
from lqexport.models.source_view import SourceView

POWER = 0.2
"""The exponent of the mean input size in s."""
SEQUENCES = 8
"""The number of calibration sequences from which the mean size of the inputs is computed."""
TAKERS = {"attn_norm": ("attn_q", "attn_k", "attn_v", "attn_qkv"), "ffn_norm": ("ffn_gate", "ffn_up")}
"""The linears whose inputs each norm computes, by their names in GGUF."""
GATED = ("ffn_gate", "ffn_up", "ffn_down")
"""The linears of a gated MLP, by their names in GGUF. The inputs of the third are multiples of the second's outputs."""


@dataclass(frozen=True)
class Pair:
    """A module that is divided by s, and the linears whose columns are multiplied by s.

    giver    the name of the module, a norm or a linear, that alone computes the takers' inputs
    takers   the names of the linears' weights
    """

    giver: str
    takers: tuple[str, ...]


def pairs(architecture: Architecture, layers: int) -> list[Pair]:
    """Returns the pairs of all blocks.

    layers   the number of blocks

    The list is empty if one norm serves both attention and MLP, if the model has experts or blocks of several types,
    and for encoders and models with several hidden states for a token, whose norms also compute hidden states.
    """
    modules = {gguf: module for module, gguf in architecture.gguf_block.items()}
    if architecture.adds and "post_attention_norm" in modules:
        # Nothing is between attention's output and the sum, so this norm is the MLP's.
        modules.setdefault("ffn_norm", modules["post_attention_norm"])
    shared = "ffn_norm" not in modules or "attn_norm_2" in modules
    if shared or architecture.experts or architecture.only or architecture.encoder or architecture.streams:
        return []
    result = []
    for block in (f"{architecture.blocks}.{layer}" for layer in range(layers)):
        for norm, takers in TAKERS.items():
            names = tuple(f"{block}.{modules[taker]}.weight" for taker in takers if taker in modules)
            result.append(Pair(f"{block}.{modules[norm]}", names))
        if all(name in modules for name in GATED):
            result.append(Pair(f"{block}.{modules['ffn_up']}", (f"{block}.{modules['ffn_down']}.weight",)))
    return result


def column_scales(magnitudes: Tensor, power: float = POWER) -> Tensor:
    """Returns s for every column, float32 [columns]: the mean input size to the power `power`, as a power of two.

    magnitudes   the mean |x_i| of each input [columns]

    The scales are normalized to a geometric mean of about 1. A column whose input is always zero gets 1.
    """
    exponents = power * magnitudes.double().cpu().log2()
    used = exponents.isfinite()
    return torch.where(used, exponents - exponents[used].mean(), 0.0).round().exp2().float()


def scales_between(source: Weights, smoothed: Weights) -> dict[Pair, Tensor]:
    """Returns the scales s by which a model was smoothed, float32 [columns] for each pair.

    They are the ratios of the source's norm gains and the smoothed model's, rounded to powers of two. So changes by
    tuning and rounding do not matter if they are below a factor of 1.4. The scales of pairs whose giver is a linear are
    found from the sizes of its rows. Pairs whose scales are all 1 are left out.
    """
    architecture, known = architecture_of(source.config), set(source.names()) & set(smoothed.names())
    result: dict[Pair, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for pair in pairs(architecture, int(source.config["num_hidden_layers"])):
        name = f"{pair.giver}.weight"
        if name not in known or source.shape(name) != smoothed.shape(name):
            continue
        sizes = [
            _sizes(weights.read(name).float() * scale, architecture.norm_plus).log2()
            for weights, scale in ((source, columns.get(name, 1.0)), (smoothed, 1.0))
        ]
        scales = (sizes[0] - sizes[1]).round().nan_to_num(0, 0, 0).exp2().float()
        if bool((scales != 1).any()):
            result[pair] = scales
            columns |= dict.fromkeys(pair.takers, scales)
    return result


def _sizes(values: Tensor, plus: float) -> Tensor:
    """Returns the absolute gains of a norm, after `plus` is added, or the Euclidean norms of a linear's rows.

    The result is float64 [n].
    """
    return (values.double() + plus).abs() if values.ndim == 1 else values.norm(dim=1).double()


class Smoothed(SourceView):
    """A source with some pairs smoothed by scales s [columns]. Changed tensors are read as float32.

    The giver of a pair is divided by s, and the columns of its takers are multiplied by s.
    """

    def __init__(self, source: Source, scales: Mapping[Pair, Tensor]) -> None:
        super().__init__(source)
        self._plus = architecture_of(source.config).norm_plus
        self._columns = {taker: scale for pair, scale in scales.items() for taker in pair.takers}
        parameters = ("weight", "bias")
        self._givers = {f"{pair.giver}.{name}": scale for pair, scale in scales.items() for name in parameters}

    def read(self, name: str) -> Tensor:
        values = self.source.read(name)
        if name in self._givers:
            plus = self._plus if values.ndim == 1 and name.endswith(".weight") else 0.0
            scale = self._givers[name]
            values = (values.float() + plus) / (scale if values.ndim == 1 else scale[:, None]) - plus
        return values.float() * self._columns[name] if name in self._columns else values
