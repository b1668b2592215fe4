"""Quantizes by every recipe of a JSON file in one process, or one group of processes under torchrun, so that packages
are imported once. With so little memory that everything is kept in files and worked on in the smallest parts.

The file holds a list of [recipe's options, output folder]. After it `cuda` may follow: then each process has a CUDA
device that is not there (tests/cudacpu/device.py), and what the processes exchange must lie on it, as NCCL wants.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, distributed

from lqexport.pipeline.quantize import quantize
from lqexport.planning import memory
from lqexport.planning.memory import MemoryLimits
from lqexport.recipe import Recipe
from lqexport.runtime import tiles


def pretend() -> Any:
    """The device, to be entered."""
    device = runpy.run_path(str(Path(__file__).with_name("cudacpu") / "device.py"))
    os.environ.pop("LOCAL_RANK", None)  # else the second process would ask for a second device

    def checked(exchange: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: Tensor, *rest: Any) -> Any:
            assert tensor.device.type == "cuda", f"{exchange.__name__} of a tensor on the {tensor.device}"
            assert tensor.is_contiguous()
            return exchange(device["plain"](tensor), *rest)

        return call

    for name in ("send", "recv", "broadcast", "all_reduce"):
        setattr(distributed, name, checked(getattr(distributed, name)))
    return device["PretendedCuda"]()


if __name__ == "__main__":
    tiles.ROW_TILE = memory.ROW_TILE = 64  # so that small matrices have several
    there = "cuda" in sys.argv
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")
    with pretend() if there else nullcontext():
        for options, out in json.loads(Path(sys.argv[1]).read_text()):
            quantize(Recipe(**options), Path(out), device="cuda" if there else "cpu", limits=MemoryLimits(1, 1))
    if distributed.is_initialized():
        distributed.destroy_process_group()
