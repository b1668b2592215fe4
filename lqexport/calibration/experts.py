"""The second moments of experts, which see few tokens.

An expert sees only the tokens that are routed to it, often fewer than it has columns. The solver would then spend
errors freely in directions that these few tokens happen not to use. So experts get average tokens of all experts, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lqexport.calibration.moments import Group, SecondMoments
from lqexport.converters.models.architecture import EACH, Architecture
from lqexport.converters.models.tensor_names import expert_number, of_each_expert

FILL = 0.5
"""Average tokens that every expert gets beside its own, over its number of columns."""


def parts(groups: Sequence[Group], count: int) -> list[list[Group]]:
    """Returns a block's groups of linears in at most `count` parts.

    Each part has all linears of some experts. The first part also has the linears that are no expert's.
    """
    numbers = [expert_number(group[0]) or 0 for group in groups]
    experts = 1 + max(numbers, default=0)
    expert_parts: list[list[Group]] = [[] for _ in range(min(count, experts))]
    for group, number in zip(groups, numbers, strict=True):
        expert_parts[number * len(expert_parts) // experts].append(group)
    return expert_parts


def pooled(wanted: Iterable[Group], groups: Iterable[Group], architecture: Architecture) -> dict[str, list[str]]:
    """Returns the linears whose inputs `fill_up` averages, for the wanted groups of a block's groups.

    The keys are patterns such as `mlp.experts.*.up_proj`, of linears that see hidden states. The values are the linears
    of all experts that match.
    """
    pools: dict[str, list[str]] = {
        _pattern(group): [] for group in wanted if sees_hidden_states(_pattern(group), architecture)
    }
    for group in groups:
        if _pattern(group) in pools:
            pools[_pattern(group)].append(group[0])
    return pools


def fill_up(
    moments: Mapping[Group, SecondMoments], pools: Mapping[str, SecondMoments], architecture: Architecture
) -> None:
    """Adds `FILL` average tokens for each column to the moments of the experts among a block's linears.

    Linears that see hidden states get average tokens of all experts, from `pools` by the pattern of the linear. Linears
    behind an expert's activations get average tokens of this expert with uncorrelated columns, since its activations
    have nothing to do with those of other experts. On held-out tokens the solved loss falls by up to 40 per cent
    (bench/experts.py).
    """
    for group, expert in moments.items():
        pattern = _pattern(group)
        if sees_hidden_states(pattern, architecture):
            expert.add_average(*pools[pattern].sums(), FILL * expert.columns)
        elif EACH in pattern:
            total, counts = expert.sums()
            expert.add_average(total.diagonal(dim1=1, dim2=2).diag_embed(), counts, FILL * expert.columns)


def sees_hidden_states(pattern: str, architecture: Architecture) -> bool:
    """Returns whether a pattern, such as `mlp.experts.*.up_proj`, is of linears of experts that see hidden states."""
    return EACH in pattern and architecture.gguf_block[pattern.replace(EACH, "0")] != "ffn_down_exps"


def _pattern(group: Group) -> str:
    return of_each_expert(group[0])
