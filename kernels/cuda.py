"""Launches the CUDA kernels of this folder (.cu) through CuPy, which compiles each for the device at its first use.

Nothing is copied: a kernel gets the tensors' addresses, and runs on torch's current stream, in whose order torch uses
their memory again. The tests put their own `launch` in the place of this one, which runs the same launches on the CPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lqexport.formats.codec import Codec

FOLDER = Path(__file__).parent
Argument = Tensor | int | float | None
TYPES: Mapping[torch.dtype, str] = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "bf16"}
"""The kernels' names of the types that weights and activations may have."""


class KernelsMissingError(RuntimeError):
    """The kernels cannot run here; the message is a sentence that says why."""


@cache
def missing() -> str | None:
    """Why the kernels cannot run here, a sentence; None where they can."""
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported ({error}); install lqexport[cuda]."
    try:
        cupy.cuda.nvrtc.getVersion()
    except (RuntimeError, ImportError, OSError) as error:
        return f"CuPy finds no NVRTC to compile with ({' '.join(str(error).split())}); install lqexport[cuda]."
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy finds no CUDA device ({error})."
    return None if count else "CuPy finds no CUDA device."


def usable(device: torch.device) -> bool:
    """Whether the kernels can work on tensors of this device."""
    return device.type == "cuda" and missing() is None


def options() -> tuple[str, ...]:
    """What every kernel is compiled with, beside what CuPy adds. CuPy's cache does not look into headers, so their
    digest is an option."""
    headers = b"".join(path.read_bytes() for path in sorted(FOLDER.glob("*.cuh")))
    return ("-std=c++17", f"-I{FOLDER}", f"-DHEADERS=0x{hashlib.sha256(headers).hexdigest()[:8]}")


def check_planes(codec: Codec, planes: Mapping[str, Tensor], rows: int, columns: int) -> None:
    """Raises ValueError where the planes are not those of a matrix [rows, columns] of this format."""
    for plane, (dtype, shape) in codec.layout(rows, columns).items():
        if tuple(planes[plane].shape) != shape or planes[plane].element_size() != dtype.itemsize:
            found = list(planes[plane].shape)
            raise ValueError(f"Plane {plane} of {codec.name} must be {dtype} {list(shape)}, not {found}.")


def launch(
    source: str, kernel: str, blocks: int, threads: int, arguments: Sequence[Argument], shared_bytes: int = 0
) -> None:
    """Run `kernel`, a name such as `decode<Blocks<Q4_0>, float>`, of the file `source` on the tensors' device.

    arguments      contiguous tensors on one CUDA device, int32 and float32 numbers; None is a null pointer
    shared_bytes   dynamic shared memory of a block

    Raises KernelsMissingError where CuPy, NVRTC or a device is missing.
    """
    if reason := missing():
        raise KernelsMissingError(reason)
    import cupy

    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    index = torch.cuda.current_device() if device.index is None else device.index
    stream = _Stream(torch.cuda.current_stream(device).cuda_stream)
    values = tuple(_argument(each) for each in arguments)
    with cupy.cuda.Device(index):
        _function(source, kernel, index)((blocks,), (threads,), values, shared_mem=shared_bytes, stream=stream)


@cache
def _function(source: str, kernel: str, device: int) -> Any:
    """The compiled kernel; a module of its own, so that only what is used is compiled. Device: the current one."""
    import cupy

    code = (FOLDER / source).read_text()
    return cupy.RawModule(code=code, options=options(), name_expressions=(kernel,)).get_function(kernel)


class _Stream(NamedTuple):
    """A stream of torch's, as far as CuPy's launches look at it. To make it CuPy's current one, or the tensors CuPy's
    arrays, takes ten times as long as the launch."""

    ptr: int


def _argument(argument: Argument) -> np.generic:
    """As CuPy hands a value on to a kernel: by its bytes."""
    if isinstance(argument, float):
        return np.float32(argument)
    if isinstance(argument, int):
        return np.int32(argument)
    return np.uint64(0 if argument is None else argument.data_ptr())
