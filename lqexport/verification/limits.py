"""What a verified file may lose at most."""

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
"""What each limit is on, in words."""


def limits_for(limits: dict[str, float | None], source: Weights) -> dict[str, float]:
    """Those that were given and can be measured. Raises UserError for one that cannot."""
    given = {name: limit for name, limit in limits.items() if limit is not None}
    name = architecture_of(source.config).classes[0]
    if not architecture_of(source.config).encoder:
        if "min_cosine" in given:
            raise UserError(f"min_cosine is for encoders, and {name} predicts tokens: take max_kl.")
        return given
    if "max_kl" in given:
        raise UserError(f"{name} is an encoder, which predicts no tokens: take min_cosine in the place of max_kl.")
    # The command line has a limit on the perplexity by default.
    return {limit: value for limit, value in given.items() if limit == "min_cosine"}


def check_limits(result: Verification) -> None:
    """Say which limits are not kept. A number that is not finite keeps none, and fails without any limit."""
    if near := result.similarity:
        least = result.limits.get("min_cosine", -math.inf)
        if not math.isfinite(near.cosine):
            result.failed.append("The model's embeddings are not finite.")
        elif near.cosine < least:
            result.failed.append(f"{LIMITS['min_cosine']} is {near.cosine:.4g}, below the limit of {least:g}.")
    for found in result.evaluations:
        if not math.isfinite(found.kl) or not math.isfinite(found.perplexity):
            result.failed.append(f"{found.protocol}: the model's predictions are not finite.")
        for name, value in {"max_kl": found.kl, "max_perplexity_ratio": found.perplexity_ratio}.items():
            limit = result.limits.get(name)
            # Not `value > limit`, which NaN would pass.
            if limit is not None and not value <= limit:
                result.failed.append(f"{found.protocol}: {LIMITS[name]} is {value:.4g}, above the limit of {limit:g}.")
