"""Runs the unmodified .cu files on the CPU: builds programs with g++, and launches them as the GPU's launcher does.

A program holds named kernels of one .cu file, in one of three builds. Each launch is a process of its own, so that a
sanitizer that ends the process does not end the test run.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import struct
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

HERE = Path(__file__).parent
KERNELS = HERE.parent.parent / "kernels"
# NVRTC compiles so too: IEEE arithmetic, and values may be read through pointers of other types.
COMMON = ("-std=c++17", "-g1", "-fno-strict-aliasing", "-ffp-contract=off", "-fno-omit-frame-pointer", "-rdynamic")
BUILDS = {
    "plain": ("-O2", "-freorder-blocks-algorithm=simple"),
    "address": (
        "-O1", "-fsanitize=address,undefined,float-cast-overflow", "-fsanitize-sections=cudacpu_*",
        "-fno-sanitize-recover=all", "-fno-sanitize=vptr",
    ),
    "thread": ("-O1", "-fsanitize=thread"),
}  # fmt: skip
"""Name of a build -> compiler flags. `address` finds accesses out of bounds and undefined behaviour, `thread` finds
data races. The address of a call says which meeting of threads it is, so `plain` copies no blocks of code."""
ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
"""Settings of the sanitizers."""


SECONDS = 120
"""Time limit of a launch. A launch that takes longer hangs."""


class KernelError(Exception):
    """A launch broke a rule; the message is the runtime's or the sanitizer's."""


def missing() -> str | None:
    """Returns why programs cannot be built on this machine; None if they can."""
    if platform.machine() != "x86_64":
        return f"the harness switches stacks on x86-64 only, not on {platform.machine()}"
    if shutil.which("g++") is None:
        return "g++ is not installed"
    return None if headers() else "nvidia-cuda-runtime-cu12 is not installed, whose cuda_fp16.h the kernels include"


@cache
def headers() -> Path | None:
    """Returns the folder with NVIDIA's cuda_fp16.h; None if its package is not installed."""
    try:
        import nvidia
    except ModuleNotFoundError:
        return None
    folders = [Path(entry) / "cuda_runtime" / "include" for entry in nvidia.__path__]
    return next((folder for folder in folders if (folder / "cuda_fp16.h").is_file()), None)


@dataclass
class Program:
    """Kernels of one .cu file, built for the CPU."""

    path: Path

    def run(
        self, kernel: str, blocks: int, threads: int, arguments: Sequence[Tensor | int | float | None],
        shared_bytes: int = 0, seed: int = 1,
    ) -> None:  # fmt: skip
        """Runs one launch. Tensors are CPU tensors; the kernel changes them in place.

        `seed` orders the threads. Raises KernelError if the launch breaks a rule.
        """
        lines = f"{kernel}\n{blocks} {threads} {shared_bytes} {seed} {len(arguments)}\n".encode()
        content = lines + b"".join(_packed(argument) for argument in arguments)
        process = subprocess.run(
            [self.path], input=content, capture_output=True, env=os.environ | ENVIRONMENT, check=False, timeout=SECONDS
        )
        if process.returncode:
            message = process.stderr.decode(errors="replace")[:6000]
            raise KernelError(f"{kernel}: status {process.returncode}\n{message}")
        _copy_back(process.stdout, [argument for argument in arguments if isinstance(argument, Tensor)])


def _packed(argument: Tensor | int | float | None) -> bytes:
    """Returns an argument in the form that runtime.cpp reads."""
    if argument is None:
        return b"n"
    if isinstance(argument, Tensor):
        assert argument.is_contiguous()
        content = argument.reshape(-1).view(torch.uint8).numpy().tobytes()
        return b"b%d\n" % len(content) + content
    return struct.pack("<cf", b"f", argument) if isinstance(argument, float) else struct.pack("<ci", b"i", argument)


def _copy_back(content: bytes, tensors: list[Tensor]) -> None:
    """Writes the buffers that the program returned into the tensors."""
    start = 0
    for tensor in tensors:
        flat = tensor.view(-1).view(torch.uint8)
        flat.copy_(torch.frombuffer(bytearray(content[start : start + len(flat)]), dtype=torch.uint8))
        start += len(flat)
    assert start == len(content)


def build(source: Path, kernels: Iterable[str], flavour: str, folder: Path) -> Program:
    """Returns the program of some kernels, such as `decode<Blocks<Q4_0>, float>`, in the build `flavour`.

    It is built once per folder and content.
    """
    text = f'#include "{source}"\n' + "".join(f"CUDACPU_KERNEL({kernel})\n" for kernel in kernels)
    parts = [text, flavour, *(path.read_text() for path in sorted(source.parent.glob("*.cu*")))]
    runtime = _built(folder, "runtime", [], ["-O2", "-c", HERE / "runtime.cpp"])  # the same in all programs
    return Program(_built(folder, f"{source.stem}-{flavour}", parts, [
        *BUILDS[flavour], "-Wno-attributes", "-Wno-psabi", f"-I{HERE / 'include'}", f"-I{KERNELS}",
        "-isystem", headers(), "-include", HERE / "cudacpu.h", "-x", "c++", "-", "-x", "none", runtime, "-ldl",
    ], text))  # fmt: skip


def _built(folder: Path, name: str, parts: list[str], arguments: list[object], text: str = "") -> Path:
    """Returns what g++ makes with these arguments of `text`, once per folder, of `parts` and of the harness's files."""
    content = "".join([*parts, *(path.read_text() for path in sorted(HERE.glob("*.*")))])
    path = folder / f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            _run(text, "g++", *COMMON, *arguments, "-o", path)
    return path


def _run(text: str, *command: object) -> None:
    process = subprocess.run([str(part) for part in command], input=text, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{process.stderr[-4000:]}")


@dataclass
class HostGpu:
    """A replacement of `kernels.cuda.launch` that runs the launches on the CPU. Programs are built when first needed.

    flavour    name of the build, in BUILDS
    folder     where programs are built
    kernels    source file -> all its kernels that may be launched
    seed       orders the threads
    """

    flavour: str
    folder: Path
    kernels: dict[str, list[str]]
    seed: int = 1
    _programs: dict[str, Program] = field(default_factory=dict)

    def launch(
        self,
        source: str,
        kernel: str,
        blocks: int,
        threads: int,
        arguments: Sequence[Tensor | int | float | None],
        shared_bytes: int = 0,
    ) -> None:
        """Runs one launch; its parameters are those of `kernels.cuda.launch`."""
        if source not in self._programs:
            self._programs[source] = build(KERNELS / source, self.kernels[source], self.flavour, self.folder)
        self._programs[source].run(kernel, blocks, threads, arguments, shared_bytes, self.seed)
