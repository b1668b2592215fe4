"""Decodes packed planes of the native formats to a dense matrix where the CUDA kernels cannot run.

The weights are bitwise equal to those of `formats`. On a CPU numba decodes them, on any other device torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lqexport.formats.mxint import BIAS, MXInt
from lqexport.formats.native import Affine, Table
from lqexport.formats.registry import codec_named


class _Scaled(NamedTuple):
    """The weights scale * (code - first) + offset; scale and offset are float32 [rows, groups]."""

    first: int
    scale: Tensor
    offset: Tensor


def decode(name: str, planes: Mapping[str, Tensor], columns: int) -> Tensor:
    """Returns the weights of the native format `name`, float32 [rows, columns], on the planes' device.

    Raises ValueError for a format that is not native.
    """
    on_cpu = planes["codes"].device.type == "cpu" if "codes" in planes else True
    return by_numba(name, planes, columns) if on_cpu else by_torch(name, planes, columns)


def by_torch(name: str, planes: Mapping[str, Tensor], columns: int) -> Tensor:
    """Does what `decode` does, by torch on any device."""
    codec = _native(name)
    codes = _unpacked(planes["codes"], codec.bits, columns)
    if isinstance(codec, Table):
        return planes["table"].float().gather(1, codes.long())
    numbers = _numbers(codec, planes)
    grouped = (codes - numbers.first).float().view(len(codes), numbers.scale.shape[1], -1)
    return (numbers.scale[..., None] * grouped + numbers.offset[..., None]).view(codes.shape)


def by_numba(name: str, planes: Mapping[str, Tensor], columns: int) -> Tensor:
    """Does what `decode` does, by numba. The planes must be on the CPU."""
    from lqexport.kernels import unpack

    codec = _native(name)
    stream = planes["codes"].contiguous().numpy()
    out = torch.empty(len(stream), columns)
    if isinstance(codec, Table):
        unpack.table(stream, codec.bits, planes["table"].float().numpy(), out.numpy())
    else:
        first, scale, offset = _numbers(codec, planes)
        unpack.scaled(stream, codec.bits, first, scale.numpy(), offset.numpy(), out.numpy())
    return out


def _native(name: str) -> Table | Affine | MXInt:
    codec = codec_named(name)
    if not isinstance(codec, (Table, Affine, MXInt)):
        raise ValueError(f"Only native formats are decoded here, not {name}.")
    return codec


def _numbers(codec: Affine | MXInt, planes: Mapping[str, Tensor]) -> _Scaled:
    if isinstance(codec, Affine):
        return _Scaled(0, planes["scale"].float(), planes["offset"].float())
    scale = torch.exp2(planes["exponents"].float() - (BIAS + codec.bits - 1))
    return _Scaled(2 ** (codec.bits - 1) - 1, scale, torch.zeros_like(scale))


def _unpacked(stream: Tensor, bits: int, columns: int) -> Tensor:
    """Unpacks bit streams uint8 [rows, row_bytes] to codes int16 [rows, columns]; see `formats.native`."""
    starts = torch.arange(columns, device=stream.device) * bits
    low, shift = starts // 8, (starts % 8).short()
    # A code reaches at most into the next byte. If there is no next byte, all its bits are in the first.
    high = (low + 1).clamp_max(stream.shape[1] - 1)
    words = stream[:, low].short() | (stream[:, high].short() << 8)
    return (words >> shift) & (2**bits - 1)
