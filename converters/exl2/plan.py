"""Plans EXL2 targets: which tensors are quantized, and which columns of a matrix get which bit width.

ExLlamaV2 takes any mix of bit widths in a matrix, as long as the widths fall along the stored columns. The most
important columns are stored first. All groups here have 32 columns, the fewest that ExLlamaV2 decodes; with scales of 4
bits, they cost an eighth of a bit per weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lqexport.converters.exl2.config import check_supported
from lqexport.converters.exl2.names import naming, rules_of, wants_bias
from lqexport.converters.model_tensors import model_tensors
from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.architectures import architecture_of, normalized
from lqexport.converters.models.tensor_names import block_module, is_linear, is_tied
from lqexport.converters.plan import PLAIN, UNQUANTIZED, PlannedTensor, Shapes
from lqexport.errors import UserError, with_advice
from lqexport.formats.codec import Run, nbytes
from lqexport.formats.exl2 import BITS, UNIT, Exl2, joined, name_of


def plan_exl2(
    config: dict[str, Any], shapes: Shapes, *, bits: float, head_bits: int, fallback: bool = True
) -> list[PlannedTensor]:
    """Returns every tensor of an EXL2 model in the model's order, with linears of nearly equal bits per weight.

    bits        average bits per weight of the decoder blocks' linears, with all their stored tensors counted, as in
                ExLlamaV2's converter
    head_bits   bit width of the output's codes, or 16 for float16; a quantized output is stored even if the model's
                output shares the embedding's weights
    fallback    whether an output that EXL2 cannot hold may stay in float16

    Raises UserError if the average cannot be reached, if ExLlamaV2 cannot load the model or its shapes, and as
    `targets.model_tensors` does.
    """
    config = normalized(config)
    architecture = architecture_of(config)
    check_supported(architecture, config)
    kept = dict(model_tensors(architecture, config, shapes))
    linears = {name: shape for name, shape in kept.items() if is_linear(architecture, name)}
    with with_advice("Choose another target."):
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
    """Raises UserError if ExLlamaV2 could not apply a LoRA adapter, because its linears have other names."""
    architecture = architecture_of(config)
    rules = rules_of(architecture)
    if rules.split or rules.renamed:
        raise UserError(
            f"ExLlamaV2 calls the linears of {architecture.classes[0]} otherwise than an adapter does, so it cannot "
            "apply low-rank corrections to them: leave out rank, or add merge."
        )


def check_reachable(shapes: list[tuple[int, ...]], bits: float) -> None:
    """Raises UserError if no mix of widths takes `bits` per weight; the message gives the range that is possible.

    shapes   (rows, columns) of the linears
    """
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
    """Returns linear -> codec name, all of nearly equal bits per weight. Bytes that a linear leaves go to the next."""
    chosen, left = {}, 0.0
    for name, (rows, columns) in linears.items():
        left += bits * rows * columns / 8
        runs = even_runs((rows, columns), left)
        chosen[name] = name_of(runs)
        left -= _nbytes((rows, columns), runs)
    return chosen


def keeps_order(architecture: Architecture, config: dict[str, Any], name: str) -> bool:
    """Returns whether a linear's columns must be stored in their original order.

    This is so for `down_proj` where `up_proj` and `gate_proj` have biases. ExLlamaV2 reorders the outputs of these two
    as `down_proj` stores its columns, but it does not reorder their biases.
    """
    *_, before, last = architecture.linears
    biased = any(wants_bias(architecture, config, module) for module in before)
    return biased and name.endswith(tuple(f".{module}.weight" for module in last))


def even_runs(shape: tuple[int, ...], most_bytes: float) -> tuple[Run, ...]:
    """Returns runs of two neighbouring bit widths that take at most `most_bytes`, and nearly as many.

    All stored tensors of the matrix count. If even the smallest width takes more, it is taken.
    """
    rows, columns = shape
    units = columns // UNIT
    spare = most_bytes - _nbytes(shape, (Run(BITS[0], UNIT, units),))
    bits = max(0, int(spare * 8 / (UNIT * rows))) + BITS[0] * units  # sum of the widths of all units
    width = max(width for width in BITS if width * units <= bits)
    wider = min((wider for wider in BITS if wider > width), default=width + 1)
    count = min(units, (bits - width * units) // (wider - width)) if wider in BITS else 0
    return joined([Run(wider, UNIT, count), Run(width, UNIT, units - count)])


def filled_runs(importance: NDArray[np.float64], average: float) -> tuple[Run, ...]:
    """Returns the bit widths of the units of 32 columns with the least total error.

    importance   float64 [units], in the order in which the columns are stored
    average      the most bits that codes may take, on average over the units

    Each bit quarters a unit's squared error, so the sum of importance * 4^-bits is minimized. At its minimum, every
    unit has the width that minimizes importance * 4^-bits + price * bits; one price, found by bisection, meets the
    average. Widths must fall: so a unit's importance counts as at most that of every unit before it.
    """
    falling = np.minimum.accumulate(np.maximum(importance, 1e-30 * importance.max(initial=0) + 1e-300))
    widths = np.array(BITS, dtype=np.float64)
    low, high = np.log(falling.min()) - 30, np.log(falling.max()) + 30

    def widths_at(log_price: float) -> NDArray[np.float64]:
        return widths[(falling[:, None] * 4.0**-widths + np.exp(log_price) * widths).argmin(axis=1)]

    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if widths_at(middle).mean() > average else (low, middle)
    # Units of equal importance change their widths at the same price, but perhaps only some of them fit the average.
    chosen, wider = widths_at(high), widths_at(low)
    left = average * len(falling) - chosen.sum()
    fits = np.cumsum(wider - chosen) <= left + 1e-9
    chosen = np.where(fits, wider, chosen)
    return joined([Run(int(width), UNIT, 1) for width in chosen])


def _nbytes(shape: tuple[int, ...], runs: tuple[Run, ...]) -> int:
    return nbytes(Exl2(runs), *shape)


def _check_linears(architecture: Architecture, config: dict[str, Any], linears: Shapes) -> None:
    """Raises UserError if EXL2 cannot hold one of the linears; ExLlamaV2 needs all linears of a block quantized."""
    for name, shape in linears.items():
        bounds = naming(architecture).pieces(architecture, config, name, shape[0]).values()
        if shape[1] % UNIT or any(bound % UNIT for rows in bounds for bound in rows):
            raise UserError(
                f"ExLlamaV2 cannot load this model quantized: {name} is {list(shape)}, not multiples of {UNIT}."
            )
        try:
            _nbytes(shape, (Run(BITS[-1], UNIT, shape[1] // UNIT),))
        except ValueError as error:
            raise UserError(f"{name} is too large for EXL2: {error}") from error


def _check_biases(architecture: Architecture, config: dict[str, Any], kept: Shapes) -> None:
    """Raises UserError if ExLlamaV2 needs a bias that the model lacks, or has no place for a bias of the model."""
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
    """Returns the output, or [] if it is in float16 and tied; ExLlamaV2 then uses the embedding's weights."""
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
