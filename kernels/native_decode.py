"""Packed planes of the native formats to a dense matrix where the CUDA kernels do not run, bit for bit as `formats`
decodes them: compiled by numba on a CPU, by torch on any other device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lqexport.formats.mxint import BIAS, MXInt
from lqexport.formats.native import Affine, Table
from lqexport.formats.registry import codec_named


class _Scaled(NamedTuple):
    """scale * (code - first) + offset; scale and offset float32 [rows, groups]."""

    first: int
    scale: Tensor
    offset: Tensor


def decode(name: str, planes: Mapping[str, Tensor], columns: int) -> Tensor:
    """Weights float32 [rows, columns] of the native format `name`, on the planes' device.

    Raises ValueError for another format.
    """
    on_cpu = planes["codes"].device.type == "cpu" if "codes" in planes else True
    return by_numba(name, planes, columns) if on_cpu else by_torch(name, planes, columns)


def by_torch(name: str, planes: Mapping[str, Tensor], columns: int) -> Tensor:
    """`decode` by torch."""
    found = _native(name)
    codes = _unpacked(planes["codes"], found.bits, columns)
    if isinstance(found, Table):
        return planes["table"].float().gather(1, codes.long())
    numbers = _numbers(found, planes)
    grouped = (codes - numbers.first).float().view(len(codes), numbers.scale.shape[1], -1)
    return (numbers.scale[..., None] * grouped + numbers.offset[..., None]).view(codes.shape)


def by_numba(name: str, planes: Mapping[str, Tensor], columns: int) -> Tensor:
    """`decode` by numba; planes on the CPU."""
    from lqexport.kernels import unpack

    found = _native(name)
    stream = planes["codes"].contiguous().numpy()
    out = torch.empty(len(stream), columns)
    if isinstance(found, Table):
        unpack.table(stream, found.bits, planes["table"].float().numpy(), out.numpy())
    else:
        first, scale, offset = _numbers(found, planes)
        unpack.scaled(stream, found.bits, first, scale.numpy(), offset.numpy(), out.numpy())
    return out


def _native(name: str) -> Table | Affine | MXInt:
    found = codec_named(name)
    if not isinstance(found, (Table, Affine, MXInt)):
        raise ValueError(f"Only native formats are decoded here, not {name}.")
    return found


def _numbers(found: Affine | MXInt, planes: Mapping[str, Tensor]) -> _Scaled:
    if isinstance(found, Affine):
        return _Scaled(0, planes["scale"].float(), planes["offset"].float())
    scale = torch.exp2(planes["exponents"].float() - (BIAS + found.bits - 1))
    return _Scaled(2 ** (found.bits - 1) - 1, scale, torch.zeros_like(scale))


def _unpacked(stream: Tensor, bits: int, columns: int) -> Tensor:
    """Codes int16 [rows, columns] of bit streams uint8 [rows, row_bytes]; see `formats.native`."""
    starts = torch.arange(columns, device=stream.device) * bits
    low, shift = starts // 8, (starts % 8).short()
    # A code reaches into the next byte at most; where there is none, its bits are all in the first.
    high = (low + 1).clamp_max(stream.shape[1] - 1)
    words = stream[:, low].short() | (stream[:, high].short() << 8)
    return (words >> shift) & (2**bits - 1)
