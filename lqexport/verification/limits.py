"""The limits on what a file may lose: which apply to a model, and whether a verified file keeps them."""

from __future__ import annotations

import math

from lqexport.converters.models.architectures import architecture_of
from lqexport.errors import UserError
from lqexport.models.interface import Weights
from lqexport.verification.result import Verification

LIMITS = {
    "max_kl": "mean KL divergence",
    "max_perplexity_ratio": "perplexity relative to the source",
    "min_cosine": "mean cosine of embeddings",
}
"""Name of a limit -> the measured quantity, in words."""


def limits_for(limits: dict[str, float | None], source: Weights) -> dict[str, float]:
    """Returns the given limits (not None) that apply to the model.

    Raises UserError for a limit that cannot be measured: min_cosine for a model that predicts tokens, max_kl for an
    encoder.
    """
    given = {name: limit for name, limit in limits.items() if limit is not None}
    name = architecture_of(source.config).classes[0]
    if not architecture_of(source.config).encoder:
        if "min_cosine" in given:
            raise UserError(f"min_cosine is for encoders, and {name} predicts tokens: take max_kl.")
        return given
    if "max_kl" in given:
        raise UserError(f"{name} is an encoder, which predicts no tokens: take min_cosine in the place of max_kl.")
    # max_perplexity_ratio is dropped without an error, since the command line sets it by default.
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
