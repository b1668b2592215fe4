"""Decodes packed planes to a dense matrix on a GPU (decode.cu, exl2.cu, exl3.cu), bit for bit as `formats` does."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lqexport.formats.codec import WHOLE, GridCodec, Planes
from lqexport.formats.gguf import GGUF, WITH_SCALE
from lqexport.formats.gguf_ternary import GGUF_TERNARY
from lqexport.formats.gguf_vectors import GGUF_VECTORS
from lqexport.formats.mxint import MXINT
from lqexport.formats.native import NATIVE, Affine, Table
from lqexport.formats.registry import codec_named, family_of
from lqexport.kernels import cuda, cuda_exl2, cuda_exl3

SOURCE = "decode.cu"
THREADS = 256


class Reader(NamedTuple):
    """A format's reader in formats.cuh: its C++ type, and the planes that it reads, in order."""

    type: str
    planes: tuple[str, ...]


def _native(codec: GridCodec) -> Reader:
    if isinstance(codec, Table):
        return Reader(f"Table<{codec.bits}>", ("codes", "table"))
    assert isinstance(codec, Affine)
    return Reader(f"Affine<{codec.bits}>", ("codes", "scale", "offset"))


READERS: dict[str, Reader] = {
    "gguf:F32": Reader("Plain<float>", ("blocks",)),
    "gguf-norm:F32": Reader("NormPlusOne", ("blocks",)),
    "gguf:F16": Reader("Plain<__half>", ("blocks",)),
    "gguf:BF16": Reader("Plain<bf16>", ("blocks",)),
    **{
        codec.name: Reader(f"Blocks<{codec.name.removeprefix('gguf:')}>", ("blocks",))
        for codec in (*GGUF, *GGUF_TERNARY)
    },
    **{codec.name: Reader(f"Vectors<{codec.name.removeprefix('gguf:')}>", ("blocks",)) for codec in GGUF_VECTORS},
    **{codec.name: _native(codec) for codec in NATIVE},
    **{codec.name: Reader(f"MxInt<{codec.bits}>", ("codes", "exponents")) for codec in MXINT},
}
"""Codec name to its reader. To add a format, write a reader in formats.cuh and add an entry here. EXL2 and EXL3 have
kernels of their own, because their planes hold the transposed matrix in another order or basis."""


SCALED = {scaled: plain for plain, scaled in WITH_SCALE.items()}
"""Codec whose values are multiplied by its plane WHOLE -> the codec of its other planes."""


def kernels() -> list[str]:
    """Returns the name of every kernel of decode.cu that `decode` may launch."""
    readers = dict.fromkeys(reader.type for reader in READERS.values())
    return [f"decode<{reader}, {cpp_type}>" for reader in readers for cpp_type in cuda.TYPES.values()]


def decodes(name: str) -> bool:
    """Returns whether a kernel decodes the format `name`."""
    return name in READERS or name in SCALED or family_of(name) in ("exl2", "exl3")


@cache
def _table(name: str, device: torch.device) -> Tensor:
    """Returns the vectors of a format's codebook as its reader takes them, uint8 [N, 4 or 8], on a device.

    Each byte is the weight's rank among the magnitudes, or 0, 1 and 2 where vectors are lifted.
    """
    codec = codec_named(name)
    assert isinstance(codec, GridCodec)
    assert codec.codebook is not None  # `packed` has seen one
    codebook = codec.codebook
    ranks = codebook.vectors >> 1 if codebook.lift else codebook.vectors - codebook.count // 2
    return torch.from_numpy(ranks.astype(np.uint8)).to(device)


def packed(name: str, planes: Mapping[str, Tensor], columns: int) -> tuple[list[cuda.Argument], int]:
    """Returns the first six arguments of a kernel that reads the format `name`, and the number of rows.

    Raises ValueError if the planes are not those of a matrix of `columns` columns.
    """
    codec, reader = codec_named(name), READERS[name]
    rows = len(planes[reader.planes[0]])
    cuda.check_planes(codec, planes, rows, columns)
    scale = getattr(codec, "scale", None)
    pointers: list[cuda.Argument] = [planes[plane].contiguous() for plane in reader.planes]
    if getattr(codec, "codebook", None):
        pointers.append(_table(name, planes[reader.planes[0]].device))
    pointers += [None] * (3 - len(pointers))
    return [*pointers, rows, columns, (scale.group if scale else 0) or columns], rows


def decode(name: str, planes: Mapping[str, Tensor], columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decodes the planes of the format `name` on their CUDA device to weights [rows, columns] of `dtype`.

    Float16 and bfloat16 weights are the float32 weights rounded to nearest, ties to even. Raises ValueError if the
    planes are not those of such a matrix, and KernelsMissingError if kernels cannot run.
    """
    if family_of(name) == "exl2":
        return cuda_exl2.decode(name, planes, columns, dtype)
    if family_of(name) == "exl3":
        return cuda_exl3.decode(name, planes, columns, dtype)
    if name in SCALED:
        inner = {plane: values for plane, values in planes.items() if plane != WHOLE}
        return (decode(SCALED[name], inner, columns) * planes[WHOLE]).to(dtype)
    arguments, rows = packed(name, planes, columns)
    out = torch.empty(rows, columns, dtype=dtype, device=planes[READERS[name].planes[0]].device)
    blocks = -(-rows * -(-columns // 8) // THREADS)
    kernel = f"decode<{READERS[name].type}, {cuda.TYPES[dtype]}>"
    cuda.launch(SOURCE, kernel, blocks, THREADS, [*arguments, out])
    return out


def decode_arrays(
    name: str, planes: Planes, columns: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Decodes planes of the host on a CUDA device; see `decode`."""
    tensors = {plane: torch.from_numpy(np.array(array)).to(device) for plane, array in planes.items()}
    return decode(name, tensors, columns, dtype)
