"""The limits on what a file may lose: which apply to a model, and whether a verified file keeps them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lqexport.converters.models.architectures import architecture_of
from lqexport.errors import UserError, listed
from lqexport.verification.result import ExpectedLoss, Part, TensorCheck, Verification

LIMITS = {
    "max_kl": "mean KL divergence",
    "max_perplexity_ratio": "perplexity relative to the source",
    "max_over_expected": "mean KL divergence relative to that of the source rounded to the file's types",
    "min_cosine": "mean cosine of embeddings",
}
"""Name of a limit -> the measured quantity, in words."""


WEIGHT_FACTOR = 10.0
"""A tensor's relative squared error may be this many times that of rounding: solvers move weights to save outputs."""
MATRIX_FLOOR, VECTOR_FLOOR = 0.25, 0.02
"""Relative squared errors that are allowed beside it: solved matrices of high precision, and tuned norms, have some."""
PART_FLOOR = 1e-3
"""Relative error of a part's output, in amplitude, that is put down to float arithmetic and tuned norms."""


def limits_for(limits: dict[str, float | None], config: dict[str, Any]) -> dict[str, float]:
    """Returns the given limits (not None) that apply to the model of this config.json.

    Raises UserError for a limit that no file keeps, and for one that cannot be measured: min_cosine for a model that
    predicts tokens, max_kl for an encoder.
    """
    given = {name: limit for name, limit in limits.items() if limit is not None}
    for name, limit in given.items():
        if not (limit <= 1 if name == "min_cosine" else limit >= 0):  # NaN is neither
            raise UserError(f"{name} cannot be {limit:g}: no file keeps that limit.")
    name = architecture_of(config).classes[0]
    if not architecture_of(config).encoder:
        if "min_cosine" in given:
            raise UserError(f"min_cosine is for encoders, and {name} predicts tokens: take max_kl.")
        return given
    if "max_kl" in given:
        raise UserError(f"{name} is an encoder, which predicts no tokens: take min_cosine in the place of max_kl.")
    # max_perplexity_ratio and max_over_expected are dropped without an error, since they are set by default.
    return {limit: value for limit, value in given.items() if limit == "min_cosine"}


def check_limits(result: Verification) -> None:
    """Adds a sentence to `result.failed` for every limit that is not kept.

    A number that is not finite fails even without a limit.
    """
    if similarity := result.similarity:
        least = result.limits.get("min_cosine", -math.inf)
        if not math.isfinite(similarity.cosine):
            result.failed.append("The model's embeddings are not finite.")
        elif similarity.cosine < least:
            result.failed.append(f"{LIMITS['min_cosine']} is {similarity.cosine:.4g}, below the limit of {least:g}.")
    for evaluation in result.evaluations:
        if not math.isfinite(evaluation.kl) or not math.isfinite(evaluation.perplexity):
            result.failed.append(f"{evaluation.protocol}: the model's predictions are not finite.")
        for name, value in {"max_kl": evaluation.kl, "max_perplexity_ratio": evaluation.perplexity_ratio}.items():
            limit = result.limits.get(name)
            # Not `value > limit`, which NaN would pass.
            if limit is not None and not value <= limit:
                result.failed.append(
                    f"{evaluation.protocol}: {LIMITS[name]} is {value:.4g}, above the limit of {limit:g}."
                )
    factor = result.limits.get("max_over_expected", math.inf)
    for loss in result.expected:
        if loss.measured > factor * loss.expected + loss.floor:
            result.failed.append(_expectation_missed(loss, factor))
    if wrong := [part for loss in result.expected[:1] for part in parts_above(loss.parts, factor)]:
        result.failed.append(_parts_missed(wrong, factor))
    if tensors := tensors_above(result):
        result.failed.append(_tensors_missed(tensors))
    if tensors := deviating(result):
        shown = listed([f"{tensor.name} {tensor.deviation}" for tensor in tensors], 3)
        result.failed.append(
            f"{len(tensors)} tensors are as no rounding or solving of the source's leaves them: {shown}."
        )


def above_expected(result: Verification) -> bool:
    """Returns whether the file, a part or a tensor loses more than its types should cost, by `max_over_expected`."""
    factor = result.limits.get("max_over_expected", math.inf)
    return bool(tensors_above(result) or deviating(result)) or any(
        loss.measured > factor * loss.expected + loss.floor or parts_above(loss.parts, factor)
        for loss in result.expected
    )


def parts_above(parts: Sequence[Part], factor: float) -> list[Part]:
    """Returns the parts of the model whose error is above `factor` times the expected, the furthest above first.

    A part is allowed as much as the parts before it: a solver may make it correct their errors, which shows as an error
    on the source's hidden states.
    """
    allowed, above = 0.0, []
    for part in parts:
        allowed = max(allowed, part.expected)
        if part.error > factor * allowed + PART_FLOOR:
            above.append((part.error / (allowed + PART_FLOOR), part))
    return [part for _, part in sorted(above, key=lambda pair: -pair[0])]


def tensors_above(result: Verification) -> list[TensorCheck]:
    """Returns the tensors whose weights are further from the source's than any solver leaves them.

    Nothing is said about a file with an adapter, whose corrections belong to the weights.
    """
    if "max_over_expected" not in result.limits or result.adapter:
        return []
    return [tensor for tensor in result.tensors if _is_above(tensor)]


def deviating(result: Verification) -> list[TensorCheck]:
    """Returns the tensors that differ from the source's as no quantizer leaves them, by their weights alone.

    Nothing is said about a file with an adapter, whose corrections belong to the weights.
    """
    if "max_over_expected" not in result.limits or result.adapter:
        return []
    return [tensor for tensor in result.tensors if tensor.deviation]


def _is_above(tensor: TensorCheck) -> bool:
    if tensor.weight_error is None or tensor.rounding_error is None:
        return False
    floor = VECTOR_FLOOR if len(tensor.shape) == 1 else MATRIX_FLOOR
    return tensor.weight_error > WEIGHT_FACTOR * tensor.rounding_error + floor


def _tensors_missed(tensors: Sequence[TensorCheck]) -> str:
    worst = tensors[0]
    return (
        f"{len(tensors)} tensors are further from the source's than rounding and solving leave them: "
        f"{listed([tensor.name for tensor in tensors], 3)}; the relative squared error of the first is "
        f"{worst.weight_error:.2g} where rounding leaves {worst.rounding_error:.2g}."
    )


def _parts_missed(parts: Sequence[Part], factor: float) -> str:
    worst = parts[0]
    return (
        f"{len(parts)} parts of the model, run on the source's hidden states, are further from it than {factor:g} "
        f"times what rounding costs there; the furthest is {worst.name}, with a relative error of {worst.error:.2g} "
        f"where rounding leaves {worst.expected:.2g}."
    )


def _expectation_missed(loss: ExpectedLoss, factor: float) -> str:
    return (
        f"{loss.protocol}: mean KL divergence over the first {loss.windows} windows is {loss.measured:.4g}, above "
        f"{factor:g} times the {loss.expected:.4g} that the source's own weights lose when they are rounded to the "
        f"file's types (plus {loss.floor:g} for the engine), so the file is wrong by more than rounding."
    )
