"""Searches the walks of a trellis on a GPU (trellis.cu): what `trellis.search` does, but for tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lqexport.formats.trellis import POSITIONS, States
from lqexport.kernels import cuda
from lqexport.kernels.trellis import Form

SOURCE, KERNEL = "trellis.cu", "search"
THREADS = 1024
ROOM = 1 << 31
"""Bytes of work space, at most. A tile takes 17 MB at 2 bits per weight, and the half with every further bit."""


def search(targets: Tensor, weights: Tensor, form: Form, begin: int, again: bool, states: States) -> None:
    """Searches the walk of least weighted squared error for each tile, as `trellis.search` does.

    targets   float32 [T, 256], on the device that searches
    weights   float32 [256], on the same device
    states    uint16 [T, 256] on the host, written
    """
    device, tiles = targets.device, len(targets)
    nodes = 1 << (16 - int(form.new_bits.min()))
    blocks = min(tiles, max(1, ROOM // (4 * (POSITIONS + 1) * nodes)))
    costs = torch.empty(blocks, POSITIONS + 1, nodes, dtype=torch.int32, device=device)
    whole = (weights * (65535 / weights.max())).to(torch.int32)
    integers = (targets.double() * form.unit).round().clamp(-32767, 32767).to(torch.int16)
    values = torch.from_numpy(form.values).to(device)
    walks = torch.from_numpy(np.array(states, order="C").view(np.int16)).to(device)
    halves = 2 * int(form.new_bits.sum()) // POSITIONS
    arguments: list[cuda.Argument] = [
        integers, whole, values, halves, int(form.doublings), tiles, begin, int(again), nodes, costs,
        walks,
    ]  # fmt: skip
    cuda.launch(SOURCE, KERNEL, blocks, THREADS, arguments, shared_bytes=16)
    states[:] = walks.cpu().numpy().view(np.uint16)
