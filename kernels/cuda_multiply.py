"""Multiplies activations by packed weights on a GPU.

For a few tokens, the kernel decodes weights while it multiplies (multiply.cu, exl2.cu, exl3.cu). For more, they are
decoded first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lqexport.formats.gguf_vectors import GGUF_VECTORS
from lqexport.formats.native import NATIVE
from lqexport.formats.registry import family_of
from lqexport.kernels import cuda, cuda_decode, cuda_exl2, cuda_exl3

SOURCE = "multiply.cu"
THREADS = 128
ROWS = 2
TILES = (1, 8)
"""The numbers of tokens that a block of threads may have."""
MOST_TOKENS = 16
"""The most tokens of a fused product. For more, decoding once and multiplying by cuBLAS moves fewer bytes per token."""
VECTORS = tuple(codec.name for codec in GGUF_VECTORS)
FUSED = ("gguf:Q4_0", "gguf:Q8_0", "gguf:Q4_K", "gguf:Q6_K", *(codec.name for codec in NATIVE), *VECTORS)
"""The formats, besides all of EXL2 and EXL3, whose kernels decode while they multiply. Others are always decoded first.
"""
APART = {"exl2": cuda_exl2.multiply, "exl3": cuda_exl3.multiply}
"""The products of the families that have kernels of their own."""


class LowRank(NamedTuple):
    """A low-rank correction, left @ right, which is added to the weights.

    left   [rows, rank]; the fused kernels round it to float16
    right  [rank, columns]
    """

    left: Tensor
    right: Tensor


def kernels() -> list[str]:
    """Returns the name of every kernel of multiply.cu that `multiply` may launch."""
    readers = dict.fromkeys(cuda_decode.READERS[name].type for name in FUSED)
    return [
        f"multiply<{reader}, {cpp_type}, {tile}>"
        for reader in readers
        for cpp_type in cuda.TYPES.values()
        for tile in TILES
    ]


def multiply(x: Tensor, name: str, planes: Mapping[str, Tensor], low_rank: LowRank | None = None) -> Tensor:
    """Returns x W^T, [tokens, rows], in the dtype of x.

    x is [tokens, columns], in float32, float16 or bfloat16; the fused kernels sum in float32. W has the format `name`,
    and `low_rank` adds left @ right to it. For at most MOST_TOKENS tokens, the formats in FUSED, EXL2 and EXL3 are
    decoded while they are multiplied. Otherwise W is decoded into memory first.

    Raises ValueError if the planes are not those of a matrix of x's columns, and KernelsMissingError if kernels cannot
    run.
    """
    apart = APART.get(family_of(name))
    if len(x) > MOST_TOKENS or not (apart or name in FUSED):
        return _dense(x, name, planes, low_rank)
    if apart:
        return apart(x, name, planes, _correction(x, low_rank))
    arguments, rows = cuda_decode.packed(name, planes, x.shape[1])
    x = _aligned(x)
    y = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
    tile = TILES[0] if len(x) == 1 else TILES[1]
    blocks = -(-rows // ROWS) * -(-len(x) // tile)
    kernel = f"multiply<{cuda_decode.READERS[name].type}, {cuda.TYPES[x.dtype]}, {tile}>"
    shared_bytes = 4 * (THREADS // 32) * ROWS * tile  # a float32 for each warp, row and token
    arguments += [x, len(x), *_correction(x, low_rank), y]
    cuda.launch(SOURCE, kernel, blocks, THREADS, arguments, shared_bytes)
    return y


def _correction(x: Tensor, low_rank: LowRank | None) -> list[cuda.Argument]:
    """Returns the kernel's arguments `left`, `reduced` and `rank`."""
    if low_rank is None:
        return [None, None, 0]
    left, right = low_rank
    return [left.half().contiguous(), (x.float() @ right.float().T).contiguous(), left.shape[1]]


def _aligned(x: Tensor) -> Tensor:
    """Returns x contiguous and on a 16-byte boundary. torch allocates there, but a slice may begin anywhere."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _dense(x: Tensor, name: str, planes: Mapping[str, Tensor], low_rank: LowRank | None) -> Tensor:
    y = x @ cuda_decode.decode(name, planes, x.shape[1], x.dtype).T
    return y if low_rank is None else y + (x @ low_rank.right.to(x.dtype).T) @ low_rank.left.to(x.dtype).T
