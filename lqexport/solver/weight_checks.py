"""Refuses weights that no grid can store: NaN, infinite, or too large for their type."""

from __future__ import annotations

import torch
from torch import Tensor

from lqexport.errors import UserError
from lqexport.formats.codec import PlainCodec
from lqexport.formats.registry import codec_named
from lqexport.grids.reach import reach


def check_weights(name: str, weight: Tensor, codec_name: str) -> None:
    """Raises UserError if any weight is NaN or infinite, or lies beyond all grids of the codec.

    A plain type reports a weight that is too large for it when it rounds (`lqexport.formats.plain.TooLarge`).
    """
    if not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise UserError(
            f"{name} has {bad} NaN or infinite weights in the source. The checkpoint is broken; get it again."
        )
    codec = codec_named(codec_name)
    if isinstance(codec, PlainCodec):
        return
    low, high = reach(codec)
    least, greatest = (float(end) for end in weight.aminmax())
    if least < low or greatest > high:
        raise too_large(name, weight, codec_name)


def too_large(name: str, weight: Tensor, codec_name: str) -> UserError:
    """Returns the error for a tensor with a finite weight that `codec_name` cannot hold."""
    largest = float(weight.flatten()[weight.abs().argmax()])
    return UserError(
        f"{name} has a weight of {largest:.6g}, which is too large for {codec_name}: give it BF16 or F32 with "
        "--type, --embedding-type, --output-type or --factors; EXL2 and GPTQ's layout have no other type for it, so "
        "take another target there."
    )
