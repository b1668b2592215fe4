"""Targets of EXL2: which tensors ExLlamaV2 wants quantized, and how the columns of one may be shared among bit widths.

ExLlamaV2 takes any mix of widths in a matrix as long as they fall along the stored columns, and the most important
columns are stored first. All groups are of 32 columns, the least that it decodes: at 4 bits a scale they cost an eighth
of a bit per weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lqexport.converters.exl2.config import check_supported
from lqexport.converters.exl2.names import pieces, rules_of, wants_bias
from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.architectures import architecture_of, normalized
from lqexport.converters.models.tensor_names import block_module, is_linear, is_tied
from lqexport.converters.plan import PLAIN, PlannedTensor
from lqexport.converters.targets import Shapes, model_tensors
from lqexport.errors import UserError
from lqexport.formats.codec import Run, nbytes
from lqexport.formats.exl2 import BITS, UNIT, Exl2, joined, name_of

UNQUANTIZED = 16


def plan_exl2(
    config: dict[str, Any], shapes: Shapes, *, bits: float, head_bits: int, fallback: bool = True
) -> list[PlannedTensor]:
    """Every tensor of an EXL2 model, in the order of the model, linears of nearly equal width.

    bits        of the decoder blocks' linears on average, all their tensors counted, as ExLlamaV2's converter counts
    head_bits   width of the output's codes, or 16 for float16; where it shares the embedding's weights, the file
                nevertheless has one of its own
    fallback    whether an output that EXL2 cannot hold may stay in float16

    Raises UserError for a size that cannot be reached, for shapes that ExLlamaV2 cannot load, and as `targets.plan`.
    """
    config = normalized(config)
    architecture = architecture_of(config)
    check_supported(architecture, config)
    kept = dict(model_tensors(architecture, config, shapes))
    linears = {name: shape for name, shape in kept.items() if is_linear(architecture, name)}
    _check_linears(architecture, config, linears)
    _check_biases(architecture, config, kept)
    check_reachable(list(linears.values()), bits)
    chosen = _even_codecs(linears, bits)
    planned = [
        PlannedTensor(name, shape, chosen.get(name, PLAIN), name in chosen)
        for name, shape in kept.items()
        if name != architecture.output
    ]
    head = kept[architecture.embedding if is_tied(config) else architecture.output]
    return planned + _planned_head(architecture, head, is_tied(config), head_bits, fallback)


def check_corrections(config: dict[str, Any]) -> None:
    """Raises UserError where ExLlamaV2 would not find the linears of a LoRA adapter, which has transformers' names."""
    architecture = architecture_of(config)
    rules = rules_of(architecture)
    if rules.split or rules.renamed:
        raise UserError(
            f"ExLlamaV2 calls the linears of {architecture.classes[0]} otherwise than an adapter does, so it cannot "
            "apply low-rank corrections to them: leave out rank, or add merge."
        )


def check_reachable(shapes: list[tuple[int, ...]], bits: float) -> None:
    """Raises UserError where no mix of widths takes `bits` per weight, naming those that can be reached."""
    weights = sum(rows * columns for rows, columns in shapes)
    least, most = (
        8 * sum(_nbytes(shape, (Run(width, UNIT, shape[1] // UNIT),)) for shape in shapes) / weights
        for width in (BITS[0], BITS[-1])
    )
    if not least <= bits <= most:
        raise UserError(
            f"EXL2 cannot store this model's linears at {bits:g} bits per weight: "
            f"from {np.ceil(1000 * least) / 1000:.3f} to {np.floor(1000 * most) / 1000:.3f} can be reached."
        )


def _even_codecs(linears: Shapes, bits: float) -> dict[str, str]:
    """A codec for every linear, all of nearly equal width; what one leaves of its share goes to the next."""
    chosen, left = {}, 0.0
    for name, (rows, columns) in linears.items():
        left += bits * rows * columns / 8
        runs = even_runs((rows, columns), left)
        chosen[name] = name_of(runs)
        left -= _nbytes((rows, columns), runs)
    return chosen


def keeps_order(architecture: Architecture, config: dict[str, Any], name: str) -> bool:
    """Whether a linear's columns must be stored in their own order.

    ExLlamaV2 reorders the outputs of `up_proj` and `gate_proj` as `down_proj` wants its inputs, but not their biases.
    """
    *_, before, last = architecture.linears
    biased = any(wants_bias(architecture, config, module) for module in before)
    return biased and name.endswith(tuple(f".{module}.weight" for module in last))


def even_runs(shape: tuple[int, ...], budget: float) -> tuple[Run, ...]:
    """Two neighbouring widths that together take at most `budget` bytes, all tensors counted, and nearly as many; where
    even the narrowest takes more, that one."""
    rows, columns = shape
    units = columns // UNIT
    spare = budget - _nbytes(shape, (Run(BITS[0], UNIT, units),))
    bits = max(0, int(spare * 8 / (UNIT * rows))) + BITS[0] * units  # of all units of one row
    width = max(width for width in BITS if width * units <= bits)
    wider = min((wider for wider in BITS if wider > width), default=width + 1)
    count = min(units, (bits - width * units) // (wider - width)) if wider in BITS else 0
    return joined([Run(wider, UNIT, count), Run(width, UNIT, units - count)])


def filled_runs(importance: NDArray[np.float64], average: float) -> tuple[Run, ...]:
    """Widths of the units of 32 columns, their codes taking at most `average` bits, for falling importances [units].

    Each bit quarters a unit's squared error, so the least sum of importance * 4^-bits gives every unit the width that
    minimises importance * 4^-bits + price * bits, at the price that meets the average. A unit's importance counts as no
    more than that of any before it, so that widths fall.
    """
    falling = np.minimum.accumulate(np.maximum(importance, 1e-30 * importance.max(initial=0) + 1e-300))
    widths = np.array(BITS, dtype=np.float64)
    low, high = np.log(falling.min()) - 30, np.log(falling.max()) + 30

    def at(price: float) -> NDArray[np.float64]:
        return widths[(falling[:, None] * 4.0**-widths + np.exp(price) * widths).argmin(axis=1)]

    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).mean() > average else (low, middle)
    chosen, dearer = at(high), at(low)  # units of equal importance change together, and only some of them may fit
    left = average * len(falling) - chosen.sum()
    fits = np.cumsum(dearer - chosen) <= left + 1e-9
    chosen = np.where(fits, dearer, chosen)
    return joined([Run(int(width), UNIT, 1) for width in chosen])


def _nbytes(shape: tuple[int, ...], runs: tuple[Run, ...]) -> int:
    return nbytes(Exl2(runs), *shape)


def _check_linears(architecture: Architecture, config: dict[str, Any], linears: Shapes) -> None:
    """Raises UserError for a linear that EXL2 cannot hold: ExLlamaV2 loads no block that is quantized in part."""
    for name, shape in linears.items():
        bounds = pieces(architecture, config, name, shape[0]).values()
        if shape[1] % UNIT or any(bound % UNIT for rows in bounds for bound in rows):
            raise UserError(
                f"ExLlamaV2 cannot load this model quantized: {name} is {list(shape)}, not multiples of {UNIT}."
            )
        try:
            _nbytes(shape, (Run(BITS[-1], UNIT, shape[1] // UNIT),))
        except ValueError as error:
            raise UserError(f"{name} is too large for EXL2: {error}") from error


def _check_biases(architecture: Architecture, config: dict[str, Any], kept: Shapes) -> None:
    """Raises UserError where ExLlamaV2 wants a bias that the model lacks, or has no place for one."""
    for name in kept:
        module, bias = block_module(architecture, name), f"{name.removesuffix('.weight')}.bias"
        if module is None or not is_linear(architecture, name):
            continue
        if (wanted := wants_bias(architecture, config, module[1])) != (bias in kept):
            raise UserError(
                f"ExLlamaV2 wants a tensor {bias} for {architecture.classes[0]}, and the model has none."
                if wanted
                else f"ExLlamaV2 has no place for {bias} of the model."
            )


def _planned_head(
    architecture: Architecture, shape: tuple[int, ...], tied: bool, bits: int, fallback: bool
) -> list[PlannedTensor]:
    """The output; nothing where it is in float16 and shares the embedding's weights, which ExLlamaV2 then uses."""
    if bits not in (*BITS, UNQUANTIZED):
        raise UserError(f"The output's codes can have {', '.join(map(str, (*BITS, UNQUANTIZED)))} bits, not {bits}.")
    rows, columns = shape
    wanted = name_of((Run(bits, UNIT, columns // UNIT),)) if bits != UNQUANTIZED else PLAIN
    if bits != UNQUANTIZED and rows % UNIT == 0:
        return [PlannedTensor(architecture.output, shape, wanted, True)]
    reason = None if bits == UNQUANTIZED else f"{rows} rows are not a multiple of {UNIT}"
    if reason and not fallback:
        raise UserError(f"EXL2 cannot hold {architecture.output}: {reason}.")
    if tied:
        return []
    return [PlannedTensor(architecture.output, shape, PLAIN, False, wanted if reason else None, reason)]
