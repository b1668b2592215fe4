"""Compiles kernels with NVRTC as CuPy does, without a driver, and reads ptxas's report of registers and spills."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

ARCHITECTURES = (70, 75, 80, 86, 89, 90, 120)
"""Compute capabilities, ten times the number."""
CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")
"""Options that CuPy's RawModule adds to the caller's."""


class Usage(NamedTuple):
    """The resources that one kernel takes.

    registers   registers per thread
    spills      bytes of spills, stores and loads together
    stack       bytes of local memory
    shared      bytes of static shared memory per block
    """

    kernel: str
    registers: int
    spills: int
    stack: int
    shared: int


@cache
def library() -> ctypes.CDLL | None:
    """Returns libnvrtc of nvidia-cuda-nvrtc-cu12; None if the package is not installed."""
    try:
        import nvidia
    except ModuleNotFoundError:
        return None
    libraries = [path for entry in nvidia.__path__ for path in Path(entry).glob("cuda_nvrtc/lib/libnvrtc.so.*")]
    return ctypes.CDLL(str(libraries[0])) if libraries else None


def compile_kernels(source: Path, kernels: Sequence[str], architecture: int, options: Sequence[str]) -> list[Usage]:
    """Compiles some kernels of one .cu file to machine code, and returns what each takes.

    NVRTC compiles others of the file with them, if they are no templates; they are left out.
    `architecture` is one of ARCHITECTURES. Raises RuntimeError with NVRTC's log if compiling fails.
    """
    nvrtc = library()
    assert nvrtc is not None
    flags = [*options, *CUPY_OPTIONS, f"-arch=sm_{architecture}", "--ptxas-options=-v"]
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None)
    for kernel in kernels:
        nvrtc.nvrtcAddNameExpression(program, kernel.encode())
    status = nvrtc.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*map(str.encode, flags)))
    log = _text(nvrtc, program, "ProgramLog")
    if status:
        raise RuntimeError(f"{source.name} for sm_{architecture}: {log}")
    lowered = {_lowered(nvrtc, program, kernel): kernel for kernel in kernels}
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return [usage._replace(kernel=lowered[usage.kernel]) for usage in _usages(log) if usage.kernel in lowered]


def _text(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, name: str) -> str:
    """Returns a text of a program, such as ProgramLog, by NVRTC's functions of that name."""
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{name}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{name}")(program, text)
    return text.value.decode()


def _lowered(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, kernel: str) -> str:
    """Returns the mangled name of a kernel."""
    name = ctypes.c_char_p()
    if nvrtc.nvrtcGetLoweredName(program, kernel.encode(), ctypes.byref(name)) or name.value is None:
        raise RuntimeError(f"NVRTC knows no kernel {kernel}")
    return name.value.decode()


def _usages(log: str) -> list[Usage]:
    """Returns what ptxas reports of each kernel. Functions of the log that are no kernels are left out."""
    usages = []
    for entry in log.split("Compiling entry function '")[1:]:
        numbers = {
            label: int(count)
            for count, label in re.findall(r"(\d+) (bytes stack|bytes spill \w+|registers|bytes smem)", entry)
        }
        spills = numbers["bytes spill stores"] + numbers["bytes spill loads"]
        stack, shared = numbers["bytes stack"], numbers.get("bytes smem", 0)
        usages.append(Usage(entry.split("'")[0], numbers["registers"], spills, stack, shared))
    return usages
