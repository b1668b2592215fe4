"""The environment of a run: device, thread and float32 settings, peak memory, and versions of packages."""

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
"""The packages whose versions are reported with every measurement."""


def choose_device(name: str) -> torch.device:
    """Returns the device for a name: `auto`, `cpu`, `cuda` or `cuda:1`.

    If torchrun starts several processes, `cuda` gives each of them its own GPU. Raises UserError if the name is unknown
    or torch sees no such device.
    """
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
    """Fixes torch's number of threads for the whole process.

    When numba starts its OpenMP threads, their number becomes torch's too, and the last bits of torch's products depend
    on it. Products before and after the first compiled loop would then differ, and so would a resumed run and an
    uninterrupted one.
    """
    threads = torch.get_num_threads()
    start_pool()
    torch.set_num_threads(threads)


def full_float32() -> None:
    """Makes torch multiply float32 matrices in full float32 for the whole process, on a GPU without TF32.

    TF32 rounds the operands to 11 significant bits. Hessians and the solver need all 24, and the user's settings may
    allow TF32.
    """
    torch.set_float32_matmul_precision("highest")


def peak_memory() -> int:
    """Returns the peak resident memory of this process, in bytes.

    On Linux this is VmHWM of /proc/self/status. `ru_maxrss` would be wrong there: it starts with the peak of the parent
    process, because exec keeps it, and that may be larger than this process's own. Elsewhere `ru_maxrss` is used.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    match = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def versions(*packages: str) -> dict[str, str]:
    """Returns the installed version of each package by its name."""
    return {package: importlib.metadata.version(package) for package in packages}
