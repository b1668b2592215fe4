"""Chooses the number by which all values of a matrix are multiplied, in formats that store one (`Grid.whole`)."""

from __future__ import annotations

from torch import Tensor

from lqexport.formats.codec import GridCodec, PlainCodec, SectionedCodec, TrellisCodec

HEADROOM = 2.0
"""The largest multiple of the scale that covers a group's largest weight which a fit tries (`fit.NEAR`)."""
LEAST = -100
"""The least exponent of the number. Weights below 2^-90 alone would call for a lower one."""


def fitted_whole(codec: PlainCodec | GridCodec | SectionedCodec | TrellisCodec, weight: Tensor) -> float:
    """Returns the power of two by which a matrix of `codec` is multiplied; 1 if the format stores no such number.

    weight   the whole matrix, of any float dtype

    The group with the largest weight gets one of the largest scales that the format has, so that the scales of all
    other groups have all their bits, too: floats of few bits lose some near 0. A scale has as many bits anywhere above
    that, so no other number would do better than a power of two, and with one all products are exact.
    """
    if not isinstance(codec, GridCodec) or not codec.has_whole:
        return 1.0
    assert codec.scale is not None
    assert codec.levels is not None
    most = codec.scale.floats.most * float(codec.levels[-1]) / HEADROOM
    largest = weight.abs().max().double() / most
    exponent = int(largest.frexp().exponent)
    return 2.0 ** max(exponent, LEAST) if largest > 0 else 1.0


def in_units(weight: Tensor, whole: float) -> Tensor:
    """Returns weights divided by the number by which the values of their grid are multiplied."""
    return weight if whole == 1 else weight / whole
