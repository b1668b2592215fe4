"""What a run computes on and with: the device, and the versions of packages."""

from __future__ import annotations

import importlib.metadata
import os
import re
import resource
import sys
from pathlib import Path

import torch

from lqexport.errors import UserError
from lqexport.kernels.threads import start_pool

PACKAGES = ("lqexport", "torch", "transformers", "numpy", "gguf")
"""The packages whose versions a measurement is reported with."""


def choose_device(name: str) -> torch.device:
    """The device for `auto`, `cpu`, `cuda` or `cuda:1`. Raises UserError where it is unknown or not there.

    Of several processes that torchrun starts, each gets a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"There is no device {name!r}; choose auto, cpu or cuda (cuda:1 for the second one).")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"torch sees no CUDA device {name} here; choose --device cpu.")
    return device


def steady_threads() -> None:
    """Keep torch's number of threads as it is for the whole process.

    When numba starts its OpenMP threads, the number of those becomes torch's too; and the last bits of torch's products
    depend on it. A resumed run would then differ from a whole one by what came before its first compiled loop.
    """
    threads = torch.get_num_threads()
    start_pool()
    torch.set_num_threads(threads)


def full_float32() -> None:
    """Multiply float32 matrices in float32 for the whole process: on a GPU by cuBLAS without TF32, whose factors have
    11 bits. Second moments and the solver need all 24, and a user's settings may say otherwise.
    """
    torch.set_float32_matmul_precision("highest")


def peak_memory() -> int:
    """Bytes of this process that were resident at its peak.

    Not `ru_maxrss` where the kernel tells better: on Linux that begins with the peak of the process that started this
    one (exec keeps it), be it larger than all that this one takes.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def versions(*packages: str) -> dict[str, str]:
    """Package name to installed version."""
    return {package: importlib.metadata.version(package) for package in packages}
