"""Quantizes by every recipe of a JSON file, in one process or in one group of processes under torchrun.

So packages are imported once. The memory limits are so small that everything is kept in files and solved in the
smallest parts. The file holds a list of [recipe's options, output folder]. With `cuda` as second argument each process
has a pretended CUDA device (tests/cudacpu/device.py), and tensors that processes exchange must be on it, as NCCL
requires.
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
    """Returns the pretended device's mode, and makes every exchange check its tensor."""
    device = runpy.run_path(str(Path(__file__).with_name("cudacpu") / "device.py"))
    os.environ.pop("LOCAL_RANK", None)  # otherwise the second process would ask for a second device

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
    tiles.ROW_TILE = memory.ROW_TILE = 64  # so that small matrices have several tiles
    on_cuda = "cuda" in sys.argv
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")
    with pretend() if on_cuda else nullcontext():
        for options, out in json.loads(Path(sys.argv[1]).read_text()):
            quantize(Recipe(**options), Path(out), device="cuda" if on_cuda else "cpu", limits=MemoryLimits(1, 1))
    if distributed.is_initialized():
        distributed.destroy_process_group()
