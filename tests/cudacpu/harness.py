"""Runs the unmodified .cu files on the CPU: builds programs with g++, and launches as the GPU's launcher does.

A program is one .cu file with some of its kernels by name, in one of three builds. It runs one launch per process, so
that a sanitizer that ends the process ends no test run.
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
# As NVRTC compiles: IEEE arithmetic, and types read through pointers of other types.
COMMON = ("-std=c++17", "-g", "-fno-strict-aliasing", "-ffp-contract=off", "-fno-omit-frame-pointer", "-rdynamic")
BUILDS = {
    "plain": ("-O2",),
    "address": (
        "-O1", "-fsanitize=address,undefined,float-cast-overflow", "-fsanitize-sections=cudacpu_*",
        "-fno-sanitize-recover=all", "-fno-sanitize=vptr",
    ),
    "thread": ("-O1", "-fsanitize=thread"),
}  # fmt: skip
"""Flags of each build. `address` finds accesses out of bounds and undefined behaviour, `thread` data races."""
ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}


SECONDS = 120
"""A launch that takes longer hangs."""


class KernelError(Exception):
    """What a launch did that it must not do, as the runtime or a sanitizer says it."""


def missing() -> str | None:
    """Why programs cannot be built here, or None."""
    if platform.machine() != "x86_64":
        return f"the harness switches stacks on x86-64 only, not on {platform.machine()}"
    if shutil.which("g++") is None:
        return "g++ is not installed"
    return None if headers() else "nvidia-cuda-runtime-cu12 is not installed, whose cuda_fp16.h the kernels include"


@cache
def headers() -> Path | None:
    """The folder with NVIDIA's cuda_fp16.h."""
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
        """Launch; tensors on the CPU are buffers, which change in place. Raises KernelError where a rule is broken."""
        lines = f"{kernel}\n{blocks} {threads} {shared_bytes} {seed} {len(arguments)}\n".encode()
        content = lines + b"".join(_packed(argument) for argument in arguments)
        done = subprocess.run(
            [self.path], input=content, capture_output=True, env=os.environ | ENVIRONMENT, check=False, timeout=SECONDS
        )
        if done.returncode:
            raise KernelError(f"{kernel}: status {done.returncode}\n{done.stderr.decode(errors='replace')[:6000]}")
        _copy_back(done.stdout, [argument for argument in arguments if isinstance(argument, Tensor)])


def _packed(argument: Tensor | int | float | None) -> bytes:
    if argument is None:
        return b"n"
    if isinstance(argument, Tensor):
        assert argument.is_contiguous()
        content = argument.reshape(-1).view(torch.uint8).numpy().tobytes()
        return b"b%d\n" % len(content) + content
    return struct.pack("<cf", b"f", argument) if isinstance(argument, float) else struct.pack("<ci", b"i", argument)


def _copy_back(content: bytes, tensors: list[Tensor]) -> None:
    start = 0
    for tensor in tensors:
        flat = tensor.view(-1).view(torch.uint8)
        flat.copy_(torch.frombuffer(bytearray(content[start : start + len(flat)]), dtype=torch.uint8))
        start += len(flat)
    assert start == len(content)


def build(source: Path, kernels: Iterable[str], flavour: str, folder: Path) -> Program:
    """The program of these kernels, such as `decode<Blocks<Q4_0>, float>`; built once per folder and content."""
    text = f'#include "{source}"\n' + "".join(f"CUDACPU_KERNEL({kernel})\n" for kernel in kernels)
    parts = [text, flavour, *(path.read_text() for path in sorted([*source.parent.glob("*.cu*"), *HERE.glob("*.*")]))]
    path = folder / f"{source.stem}-{flavour}-{hashlib.sha256(''.join(parts).encode()).hexdigest()[:16]}"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            _compile(text, flavour, path)
    return Program(path)


def _compile(text: str, flavour: str, path: Path) -> None:
    runtime, main = path.with_suffix(".o"), path.with_suffix(".cpp")
    main.write_text(text)
    _run("g++", *COMMON, "-O2", "-c", HERE / "runtime.cpp", "-o", runtime)
    _run(
        "g++", *COMMON, *BUILDS[flavour], "-Wno-attributes", "-Wno-psabi", f"-I{HERE / 'include'}", f"-I{KERNELS}",
        "-isystem", headers(), "-include", HERE / "cudacpu.h", main, runtime, "-ldl", "-o", path,
    )  # fmt: skip


def _run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[-4000:]}")


@dataclass
class HostGpu:
    """Stands in for `kernels.cuda.launch`: the same launches on the CPU. Programs are built when first needed.

    kernels    of each source file, all that may be launched
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
        """See `kernels.cuda.launch`."""
        if source not in self._programs:
            self._programs[source] = build(KERNELS / source, self.kernels[source], self.flavour, self.folder)
        self._programs[source].run(kernel, blocks, threads, arguments, shared_bytes, self.seed)
