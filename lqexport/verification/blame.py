"""Names the likely cause of a loss that is too large: a setting, a block and its tensor, how it shows by position."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from lqexport.models.interface import Weights
from lqexport.verification.limits import deviating, parts_above, tensors_above
from lqexport.verification.result import Verification
from lqexport.verification.rounded_source import RoundedSource
from lqexport.verification.settings import different_settings
from lqexport.verification.tensor_faults import fault_of

MOST = 0.6
"""Share of suspected blocks above which a setting is the likely cause, rather than a block."""


def causes(result: Verification, file: Weights, rounded: RoundedSource, source: Weights) -> list[str]:
    """Returns one sentence for each likely cause of a file's loss, the strongest evidence first.

    result    the result so far, with its expected losses
    file      the file's weights, with its adapter if it has one
    source    the source, smoothed as the file is
    """
    parts = result.expected[0].parts if result.expected else []
    suspects = parts_above(parts, result.limits["max_over_expected"])
    most = sum(part.name.startswith("block") for part in suspects) > MOST * max(1, len(parts) - 2)
    # A setting is in all blocks, so the first of them tells as much as all.
    named = suspects[: 1 if different_settings(file.config, source.config) else 3]
    inside = [(part.tensors, part.tensors) for part in named]
    for tensor in (*tensors_above(result)[:3], *deviating(result)[:3]):
        inside.append(((tensor.name,), next((part.tensors for part in parts if tensor.name in part.tensors), ())))
    faults = [sentence for names, among in inside if (sentence := fault_of(names, among, file, rounded, source))]
    everywhere = ["Most blocks are too far from the source: a setting, or a rule for all blocks, may be wrong."]
    where = [by_position(result.expected[0].kl_by_position)] if result.expected else []
    return [*(everywhere if most else []), *dict.fromkeys(faults), *where]


def by_position(means: Sequence[float]) -> str:
    """Returns a sentence about how the KL divergence depends on the position, for its means in equal bins of a window.

    The first bin is left out, since the first tokens have little context.
    """
    means = means[1:]
    for cut in range(1, len(means)):
        if max(means[:cut]) < min(means[cut:]) / 5:
            share = (cut + 1) / (len(means) + 1)
            return f"The loss begins at {share:.0%} of the window: a sliding window or the context may be wrong."
    if statistics.mean(means[-2:]) > 3 * statistics.mean(means[:2]):
        return "The loss grows with the position: a rotation (rope) or a window may be wrong."
    return "The loss is alike at all positions: a weight or a setting that acts on every token may be wrong."
