"""EXL2 on a GPU (exl2.cu): decodes planes to a dense matrix, bit for bit as `formats` does, and multiplies by them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from lqexport.formats.exl2 import UNIT, Exl2, runs_named
from lqexport.kernels import cuda

SOURCE = "exl2.cu"
DECODE_THREADS = 256
MULTIPLY_THREADS = 512
TILE = 32
"""Rows of a block of threads; in the decoding kernel also its columns."""
TILES = (1, 8)
"""The numbers of tokens that a block of the product may have."""


def kernels() -> list[str]:
    """Returns the name of every kernel of exl2.cu that may be launched."""
    cpp_types = cuda.TYPES.values()
    return [f"decode_exl2<{cpp_type}>" for cpp_type in cpp_types] + [
        f"multiply_exl2<{cpp_type}, {n}>" for cpp_type in cpp_types for n in TILES
    ]


def decode(name: str, planes: Mapping[str, Tensor], columns: int, dtype: torch.dtype) -> Tensor:
    """See `cuda_decode.decode`."""
    arguments, rows = _packed(name, planes, columns)
    out = torch.empty(rows, columns, dtype=dtype, device=planes["q_weight"].device)
    blocks = rows // TILE * (columns // TILE)
    kernel = f"decode_exl2<{cuda.TYPES[dtype]}>"
    arguments += [planes["q_invperm"].contiguous(), rows, columns, out]
    cuda.launch(SOURCE, kernel, blocks, DECODE_THREADS, arguments, 4 * TILE * (TILE + 1))
    return out


def multiply(x: Tensor, name: str, planes: Mapping[str, Tensor], correction: list[cuda.Argument]) -> Tensor:
    """See `cuda_multiply.multiply`. `correction` is the kernel's arguments `left`, `reduced` and `rank`."""
    arguments, rows = _packed(name, planes, x.shape[1])
    stored = torch.empty_like(x, memory_format=torch.contiguous_format)
    stored.index_copy_(1, planes["q_invperm"].long(), x)
    y = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
    tile = TILES[0] if len(x) == 1 else TILES[1]
    blocks = rows // TILE * -(-len(x) // tile)
    kernel = f"multiply_exl2<{cuda.TYPES[x.dtype]}, {tile}>"
    shared_bytes = 4 * (MULTIPLY_THREADS // 32) * TILE * tile  # a float32 for each warp, row and token
    arguments += [rows, x.shape[1], stored, len(x), *correction, y]
    cuda.launch(SOURCE, kernel, blocks, MULTIPLY_THREADS, arguments, shared_bytes)
    return y


def _packed(name: str, planes: Mapping[str, Tensor], columns: int) -> tuple[list[cuda.Argument], int]:
    """Returns the first four arguments of the kernels, and the number of rows."""
    codec, rows = Exl2(runs_named(name)), planes["q_weight"].shape[-1]
    cuda.check_planes(codec, planes, rows, columns)
    units = _units(codec.name, planes["q_weight"].device)
    return [*(planes[plane].contiguous() for plane in ("q_weight", "q_scale", "q_scale_max")), units], rows


@cache
def _units(name: str, device: torch.device) -> Tensor:
    """Returns the bits, first line and group of every 32 stored columns, int32 [columns / 32, 3]."""
    units, line, group = [], 0, 0
    for run in runs_named(name):
        for k in range(run.columns // UNIT):
            units.append((run.bits, line, group + k * UNIT // run.group))
            line += run.bits
        group += run.count
    return torch.tensor(units, dtype=torch.int32).to(device)
