"""Placement: where a run keeps its large tensors, and how many rows and experts it processes at once.

The choice follows from the memory limits; results do not depend on it. All arithmetic is done on the device, in steps
of fixed sizes. Tensors that are kept between steps may be on the device, in the host's memory, or in a file that is
mapped into memory, which the operating system writes to disk when memory is short.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lqexport.errors import UserError

HOST = torch.device("cpu")

Keep = Callable[[Tensor], Tensor]
"""A function that moves a tensor to where it is kept, and returns the moved tensor."""


def in_place(tensor: Tensor) -> Tensor:
    """Returns the tensor itself: the `Keep` that leaves a tensor where it was computed."""
    return tensor


@dataclass(frozen=True)
class Location:
    """A place for tensors: a device, the host's memory, or files in a folder.

    name      what users are shown: device, host or disk
    choices   devices and folders in the order of preference; a tensor goes to the first that has room
    """

    name: str
    choices: tuple[torch.device | Path, ...]

    def holds(self, device: torch.device) -> bool:
        """Returns whether tensors kept here can be used on `device` without a copy.

        A CPU can also use files, since they are mapped into its memory.
        """
        return self.name == "device" or device.type == "cpu"

    def keep(self, tensor: Tensor) -> Tensor:
        """Returns the tensor at this location; the tensor itself if it is already on the chosen device.

        Raises torch.OutOfMemoryError, or UserError for a full disk, if the last choice has no room.
        """
        for choice in self.choices[:-1]:
            try:
                return _put(tensor, choice)
            except torch.OutOfMemoryError:
                continue
        return _put(tensor, self.choices[-1])


def _put(tensor: Tensor, choice: torch.device | Path) -> Tensor:
    return tensor.to(choice) if isinstance(choice, torch.device) else mapped(tensor, choice)


def mapped(tensor: Tensor, folder: Path) -> Tensor:
    """Returns a copy of the tensor on the CPU whose memory is an unnamed file in `folder`.

    The file disappears with the tensor. Raises UserError if the disk has no room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, max(1, tensor.nbytes))
        except OSError as error:
            raise UserError(
                f"No room for {tensor.nbytes} bytes of a run's work in {folder}: {error.strerror}. Free some space, or "
                "choose another output folder."
            ) from error
        storage = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        return storage.view(tensor.shape).copy_(tensor)


@dataclass(frozen=True)
class Placement:
    """The place of each group of large tensors, and how much is processed at once.

    device    the device that computes
    moments   where the Hessians of a block are kept, except the one that is in use
    cholesky  where the panels of a Cholesky factor are kept
    rows      how many rows of a linear are solved at once, in whole tiles
    parts     the number of groups into which a block's experts are divided; Hessians are collected and solved for one
              group after the other
    hidden    where a forward pass keeps the hidden states of all sequences between blocks
    held      tokens whose passes through a block may be held while they are paused (`lqexport.calibration.paused`)
    states    whether the guided pass keeps hidden states in the host's memory; if not, they are in files, and the pass
              can resume
    unpacked  bytes on the device and on the host for unpacked tensors during tuning; tensors beyond that are unpacked
              again at each use
    """

    device: torch.device
    moments: Location
    cholesky: Location
    rows: int
    parts: int
    hidden: Location = field(compare=False)
    held: int = field(default=1 << 62, compare=False)
    states: bool = field(default=False, compare=False)
    unpacked: tuple[int, int] = field(default=(0, 0), compare=False)


def locations(device: torch.device, folder: Path) -> list[Location]:
    """Returns the possible locations, fastest first: the device, the host's memory, files in `folder`.

    Each falls back to the slower ones when it is full. A CPU has no location of its own besides the host's memory.
    """
    ordered: list[tuple[str, torch.device | Path]] = [("host", HOST), ("disk", folder)]
    if device.type != "cpu":
        ordered.insert(0, ("device", device))
    return [Location(name, tuple(choice for _, choice in ordered[i:])) for i, (name, _) in enumerate(ordered)]


def all_on_device(device: torch.device) -> Placement:
    """Returns the placement that keeps everything on the device and processes all rows and experts at once."""
    on_device = Location("device", (device,))
    return Placement(device, on_device, on_device, 1 << 62, 1, on_device)
