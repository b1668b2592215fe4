"""Packed planes of the native formats to a dense matrix by torch alone, bit for bit as `formats` decodes them.

What runs where the CUDA kernels cannot: on a CPU, and on other devices that torch knows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lqexport.formats.mxint import BIAS, MXInt
from lqexport.formats.native import Affine, Table
from lqexport.formats.registry import codec


def unpack_bits(stream: Tensor, bits: int, columns: int) -> Tensor:
    """Codes int16 [rows, columns] of bit streams uint8 [rows, row_bytes]; see `formats.native`."""
    starts = torch.arange(columns, device=stream.device) * bits
    low, shift = starts // 8, (starts % 8).short()
    # A code reaches into the next byte at most; where there is none, its bits are all in the first.
    high = (low + 1).clamp_max(stream.shape[1] - 1)
    words = stream[:, low].short() | (stream[:, high].short() << 8)
    return (words >> shift) & (2**bits - 1)


def decode(name: str, planes: Mapping[str, Tensor], columns: int) -> Tensor:
    """Weights float32 [rows, columns] of the native format `name`, on the planes' device.

    Raises ValueError for another format.
    """
    found = codec(name)
    if not isinstance(found, (Table, Affine, MXInt)):
        raise ValueError(f"torch decodes the native formats, not {name}.")
    codes = unpack_bits(planes["codes"], found.bits, columns)
    if isinstance(found, Table):
        return planes["table"].float().gather(1, codes.long())
    if isinstance(found, Affine):
        return _scaled(codes, planes["scale"].float(), planes["offset"].float())
    power = planes["exponents"].float() - (BIAS + found.bits - 1)
    return _scaled(codes - (2 ** (found.bits - 1) - 1), torch.exp2(power), torch.zeros_like(power))


def _scaled(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """scale * code + offset; codes [rows, columns], scale and offset [rows, groups]."""
    grouped = codes.float().view(len(codes), scale.shape[1], -1)
    return (scale[..., None] * grouped + offset[..., None]).view(codes.shape)
