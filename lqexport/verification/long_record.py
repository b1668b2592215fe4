"""The record of how a file's loss depends on the position in one long window."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class PositionRange:
    """Mean KL(source || file) at some positions of a range, in nats.

    first, last   the range, from the first position to the last
    positions     the number of positions that were scored
    expected      the same of the source rounded to the file's types; None if not measured
    """

    first: int
    last: int
    positions: int
    kl: float
    expected: float | None


@dataclass(frozen=True)
class LongWindow:
    """One long window.

    tokens    its length
    because   what its length comes from
    ranges    by powers of two, the first positions first
    """

    tokens: int
    because: str
    ranges: list[PositionRange] = field(default_factory=list)
