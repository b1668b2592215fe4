"""Launches the CUDA kernels of this folder (.cu) through CuPy, which compiles each for the device at its first use.

Nothing is copied. A kernel gets the tensors' addresses and runs on torch's current stream; torch reuses memory in that
stream's order, so no tensor's memory is reused too early. The tests replace `launch` by one that runs the same kernels
on the CPU.
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

from lqexport.errors import install
from lqexport.formats.codec import Codec

FOLDER = Path(__file__).parent
Argument = Tensor | int | float | None
TYPES: Mapping[torch.dtype, str] = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "bf16"}
"""The C++ type of each dtype that weights and activations may have."""


class KernelsMissingError(RuntimeError):
    """The kernels cannot run on this machine. The message is a sentence with the reason."""


@cache
def missing() -> str | None:
    """Returns why the kernels cannot run on this machine, as a sentence, or None if they can."""
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported ({error}); {install('cuda')}."
    try:
        cupy.cuda.nvrtc.getVersion()
    except (RuntimeError, ImportError, OSError) as error:
        return f"CuPy finds no NVRTC to compile with ({' '.join(str(error).split())}); {install('cuda')}."
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy finds no CUDA device ({error})."
    return None if count else "CuPy finds no CUDA device."


def usable(device: torch.device) -> bool:
    """Returns whether the kernels can run on tensors of this device."""
    return device.type == "cuda" and missing() is None


def options() -> tuple[str, ...]:
    """Returns the compiler options of every kernel, without those that CuPy adds.

    One option is a digest of the headers, because CuPy's cache does not notice when a header changes.
    """
    headers = b"".join(path.read_bytes() for path in sorted(FOLDER.glob("*.cuh")))
    return ("-std=c++17", f"-I{FOLDER}", f"-DHEADERS=0x{hashlib.sha256(headers).hexdigest()[:8]}")


def check_planes(codec: Codec, planes: Mapping[str, Tensor], rows: int, columns: int) -> None:
    """Raises ValueError if a plane's shape or item size is not that of a matrix [rows, columns] of this format."""
    for plane, (dtype, shape) in codec.layout(rows, columns).items():
        if tuple(planes[plane].shape) != shape or planes[plane].element_size() != dtype.itemsize:
            actual = list(planes[plane].shape)
            raise ValueError(f"Plane {plane} of {codec.name} must be {dtype} {list(shape)}, not {actual}.")


def launch(
    source: str, kernel: str, blocks: int, threads: int, arguments: Sequence[Argument], shared_bytes: int = 0
) -> None:
    """Launches a kernel on the tensors' device, with `blocks` blocks of `threads` threads.

    source         file of this folder, such as `decode.cu`
    kernel         name with its template arguments, such as `decode<Blocks<Q4_0>, float>`
    arguments      contiguous tensors on one CUDA device; numbers, passed as int32 and float32; None, a null pointer
    shared_bytes   bytes of a block's dynamic shared memory

    Raises KernelsMissingError if CuPy, NVRTC or a device is missing.
    """
    if reason := missing():
        raise KernelsMissingError(reason)
    import cupy

    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    index = torch.cuda.current_device() if device.index is None else device.index
    stream = _Stream(torch.cuda.current_stream(device).cuda_stream)
    values = tuple(_argument(argument) for argument in arguments)
    with cupy.cuda.Device(index):
        _function(source, kernel, index)((blocks,), (threads,), values, shared_mem=shared_bytes, stream=stream)


@cache
def _function(source: str, kernel: str, device: int) -> Any:
    """Returns the kernel, compiled for `device`, which must be the current one. Every kernel is a module, so that only
    kernels that are used are compiled."""
    import cupy

    code = (FOLDER / source).read_text()
    return cupy.RawModule(code=code, options=options(), name_expressions=(kernel,)).get_function(kernel)


class _Stream(NamedTuple):
    """A torch stream with the one attribute that CuPy's launches read.

    Making it CuPy's current stream, or the tensors CuPy arrays, takes ten times as long as the launch.
    """

    ptr: int


def _argument(argument: Argument) -> np.generic:
    """Returns an argument as the NumPy scalar whose bytes CuPy passes to the kernel."""
    if isinstance(argument, float):
        return np.float32(argument)
    if isinstance(argument, int):
        return np.int32(argument)
    return np.uint64(0 if argument is None else argument.data_ptr())
