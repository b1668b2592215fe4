"""Plans EXL3 targets: which tensors are quantized, and how many bits per weight each has.

    exl3:K    every linear of the decoder blocks at K bits per weight
    exl3      K for each linear, so that they have the recipe's bits on average

The output has `head_bits`. All other tensors are in float16, but biases of routers in float32. ExLlamaV3 takes any K
for any linear, but the experts of a block must have one K for each of their projections.
"""

from __future__ import annotations

from typing import Any

from lqexport.converters.exl3.support import check_supported, rules_of
from lqexport.converters.model_tensors import model_tensors
from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.architectures import architecture_of, normalized
from lqexport.converters.models.tensor_names import is_linear, is_tied, of_each_expert
from lqexport.converters.plan import PLAIN, UNQUANTIZED, PlannedTensor, Shapes
from lqexport.errors import UserError
from lqexport.formats.exl3 import EXL3, WRITTEN_CODEBOOK
from lqexport.formats.trellis import BLOCK, padded
from lqexport.target import Target, unknown

WIDTHS = {codec.trellis.halves / 2: name for name, codec in EXL3.items() if codec.trellis.codebook == WRITTEN_CODEBOOK}
"""K -> the codec that is written, by rising K."""
PRECISE = "gguf:F32"
"""The codec of the biases of routers. Those of some models are so large that float16 would mix up experts."""


def plan_exl3(
    target: Target, config: dict[str, Any], shapes: Shapes, *, bits: float | None, head_bits: int
) -> list[PlannedTensor]:
    """Returns every tensor of an EXL3 model in the model's order, with linears of nearly equal bits per weight.

    bits        average bits per weight of the decoder blocks' linears for the target `exl3`, else None. They are
                counted as ExLlamaV3's converter does: those of the trellises, with padded matrices
    head_bits   bits per weight of the output, or 16 for float16; a quantized output is stored even if the model's
                output shares the embedding's weights

    Raises UserError if the target or a number of bits does not exist, if ExLlamaV3 does not run the model, if it splits
    a fused linear where its rotation does not, and as `targets.model_tensors` does.
    """
    config = normalized(config)
    architecture = architecture_of(config)
    check_supported(architecture, config)
    if target.type and str(target) not in WIDTHS.values():
        raise UserError(unknown("target", str(target), [*WIDTHS.values(), target.family]))
    kept = dict(model_tensors(architecture, config, shapes))
    linears = {name: shape for name, shape in kept.items() if is_linear(architecture, name)}
    _check_pieces(architecture, config, linears)
    chosen = dict.fromkeys(linears, str(target)) if bits is None else _even_codecs(linears, bits)
    planned = [
        PlannedTensor(name, shape, chosen.get(name) or _plain_codec(name), name in chosen)
        for name, shape in kept.items()
        if name != architecture.output
    ]
    head = kept[architecture.embedding if is_tied(config) else architecture.output]
    return planned + _planned_head(architecture, head, is_tied(config), head_bits)


def _plain_codec(name: str) -> str:
    return PRECISE if name.endswith(("e_score_correction_bias", "expert_bias")) else PLAIN


def padded_weights(shape: tuple[int, ...]) -> int:
    """Returns the number of weights of a matrix whose sides are raised to multiples of 128."""
    return padded(shape[0]) * padded(shape[1])


def check_reachable(bits: float) -> None:
    """Raises UserError if no choice of K has so many bits per weight on average."""
    if not min(WIDTHS) <= bits <= max(WIDTHS):
        raise UserError(f"EXL3 has from {min(WIDTHS):g} to {max(WIDTHS):g} bits per weight, not {bits:g}.")


def _even_codecs(linears: Shapes, bits: float) -> dict[str, str]:
    """Returns linear -> codec name: the next lower K for all, and the next higher one for the first that it fits."""
    check_reachable(bits)
    low = max(width for width in WIDTHS if width <= bits)
    high = min((width for width in WIDTHS if width > low), default=low)
    together: dict[str, list[str]] = {}
    for name in linears:
        together.setdefault(of_each_expert(name), []).append(name)
    left = (bits - low) * sum(padded_weights(shape) for shape in linears.values())
    chosen: dict[str, str] = {}
    for names in together.values():
        more = (high - low) * sum(padded_weights(linears[name]) for name in names)
        fits = 0 < more <= left
        left -= more * fits
        chosen |= dict.fromkeys(names, WIDTHS[high if fits else low])
    return {name: chosen[name] for name in linears}


def _check_pieces(architecture: Architecture, config: dict[str, Any], linears: Shapes) -> None:
    """Raises UserError if a linear that ExLlamaV3 splits has a part that ends within rows that are rotated together."""
    naming = rules_of(config).naming
    for name, shape in linears.items():
        *inner, _ = naming.pieces(architecture, config, name, shape[0]).values()
        if any(end % BLOCK for _, end in inner):
            ends = ", ".join(str(end) for _, end in inner)
            raise UserError(
                f"ExLlamaV3 splits {name} at the rows {ends}, and EXL3 holds a fused linear that is split at multiples "
                f"of {BLOCK}. Choose another target."
            )


def _planned_head(architecture: Architecture, shape: tuple[int, ...], tied: bool, bits: int) -> list[PlannedTensor]:
    """Returns the output, or [] if it is in float16 and tied; ExLlamaV3 then uses the embedding's weights."""
    whole = [int(width) for width in WIDTHS if width == int(width)]
    if bits not in (*whole, UNQUANTIZED):
        raise UserError(f"The output can have {', '.join(map(str, (*whole, UNQUANTIZED)))} bits, not {bits}.")
    if bits != UNQUANTIZED:
        return [PlannedTensor(architecture.output, shape, WIDTHS[bits], True)]
    return [] if tied else [PlannedTensor(architecture.output, shape, PLAIN, False)]
