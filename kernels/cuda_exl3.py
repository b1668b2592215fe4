"""EXL3 on a GPU (exl3.cu): decodes planes to a dense matrix, bit for bit as `formats` does, and multiplies by them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lqexport.formats.exl3 import EXL3
from lqexport.formats.trellis import BLOCK, SIDE, padded
from lqexport.kernels import cuda

SOURCE = "exl3.cu"
DECODE_THREADS = 256
DECODE_BYTES = 4 * (BLOCK * 68 + 32 + BLOCK)
"""Shared memory of a block that decodes: two float16 for each pair of inputs and each output, gaps, and scales."""
ROTATE_THREADS = 128
MULTIPLY_THREADS = 512
TILES = (1, 8)
"""The numbers of tokens that a block of the product may have."""
CODEBOOKS = {"mul1": "Mul1", "mcg": "Mcg", "3inst": "ThreeInst"}
"""The C++ type of each codebook."""


def kernels() -> list[str]:
    """Returns the name of every kernel of exl3.cu that may be launched."""
    cpp_types = cuda.TYPES.values()
    return [
        *(f"decode_exl3<{codebook}, {cpp_type}>" for codebook in CODEBOOKS.values() for cpp_type in cpp_types),
        *(f"multiply_exl3<{codebook}, {tile}>" for codebook in CODEBOOKS.values() for tile in TILES),
        *(f"rotate_{side}<{cpp_type}>" for side in ("inputs", "outputs") for cpp_type in cpp_types),
    ]


def decode(name: str, planes: Mapping[str, Tensor], columns: int, dtype: torch.dtype) -> Tensor:
    """See `cuda_decode.decode`."""
    codebook, halves, rows = _checked(name, planes, columns)
    pitch = columns + columns % 2  # the kernel writes two weights at once
    out = torch.empty(rows, pitch, dtype=dtype, device=planes["trellis"].device)
    stored = [planes[plane].contiguous() for plane in ("trellis", "suh", "svh")]
    blocks = padded(rows) // BLOCK * (padded(columns) // BLOCK)
    kernel = f"decode_exl3<{codebook}, {cuda.TYPES[dtype]}>"
    cuda.launch(SOURCE, kernel, blocks, DECODE_THREADS, [*stored, halves, rows, columns, pitch, out], DECODE_BYTES)
    return out[:, :columns].contiguous()


def multiply(x: Tensor, name: str, planes: Mapping[str, Tensor], correction: list[cuda.Argument]) -> Tensor:
    """See `cuda_multiply.multiply`. `correction` is the kernel's arguments `left`, `reduced` and `rank`.

    Roundings to float16 within the matrix are left out, as ExLlamaV3's kernels for generation do. The result differs
    from the product with the decoded weights by less than 6e-4 of its norm.
    """
    (tokens, columns), device, cpp_type = x.shape, x.device, cuda.TYPES[x.dtype]
    codebook, halves, rows = _checked(name, planes, columns)
    inputs, outputs = padded(columns), padded(rows)
    rotated = torch.empty(tokens, inputs, device=device)
    arguments: list[cuda.Argument] = [x.contiguous(), planes["suh"].contiguous(), tokens, columns, rotated]
    cuda.launch(SOURCE, f"rotate_inputs<{cpp_type}>", _blocks(rotated), ROTATE_THREADS, arguments)
    sums = torch.empty(tokens, outputs, device=device)
    tile = TILES[0] if tokens == 1 else TILES[1]
    blocks = outputs // SIDE * -(-tokens // tile)
    shared_bytes = 4 * (MULTIPLY_THREADS // 32) * tile * SIDE  # a float32 for each warp, token and output
    arguments = [planes["trellis"].contiguous(), halves, outputs, inputs, rotated, tokens, sums]
    cuda.launch(SOURCE, f"multiply_exl3<{codebook}, {tile}>", blocks, MULTIPLY_THREADS, arguments, shared_bytes)
    y = torch.empty(tokens, rows, dtype=x.dtype, device=device)
    arguments = [sums, planes["svh"].contiguous(), tokens, rows, *correction, y]
    cuda.launch(SOURCE, f"rotate_outputs<{cpp_type}>", _blocks(sums), ROTATE_THREADS, arguments)
    return y


def _checked(name: str, planes: Mapping[str, Tensor], columns: int) -> tuple[str, int, int]:
    """Returns the codebook's C++ type, 2 K, and the number of rows. Raises ValueError for planes of another shape."""
    codec, rows = EXL3[name], len(planes["svh"])
    cuda.check_planes(codec, planes, rows, columns)
    return CODEBOOKS[codec.trellis.codebook], codec.trellis.halves, rows


def _blocks(numbers: Tensor) -> int:
    """Returns the number of blocks of threads that rotate the runs of `numbers`, by one warp a run."""
    return -(-numbers.numel() // (BLOCK * (ROTATE_THREADS // 32)))
