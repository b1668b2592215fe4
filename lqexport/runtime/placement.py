"""Where a run keeps what is large, and how much it does at once: what memory decides, and results do not depend on.

All arithmetic is done on the device, in steps of fixed sizes. What is kept between the steps may be elsewhere: on the
host, or in a file, mapped into memory, that the operating system writes out where memory is short.
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
"""Puts a tensor where it is to be kept, and returns it there."""


def in_place(tensor: Tensor) -> Tensor:
    """Keeps a tensor where it was computed."""
    return tensor


@dataclass(frozen=True)
class Location:
    """The first of these that has room is where tensors are put: a device, or a folder for files.

    name   as the user is told
    """

    name: str
    choices: tuple[torch.device | Path, ...]

    def holds(self, device: torch.device) -> bool:
        """Whether what is here can be computed with on the device as it is: also a file mapped into a CPU's memory."""
        return self.name == "device" or device.type == "cpu"

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor there: itself where it is there already."""
        for choice in self.choices[:-1]:
            try:
                return _put(tensor, choice)
            except torch.OutOfMemoryError:
                continue
        return _put(tensor, self.choices[-1])


def _put(tensor: Tensor, choice: torch.device | Path) -> Tensor:
    return tensor.to(choice) if isinstance(choice, torch.device) else mapped(tensor, choice)


def mapped(tensor: Tensor, folder: Path) -> Tensor:
    """A copy on the CPU whose memory is a file in `folder`, without a name, which is gone with the tensor. Raises
    UserError where the disk is full."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, max(1, tensor.nbytes))
        except OSError as error:
            raise UserError(
                f"No room for {tensor.nbytes} bytes of a run's work in {folder}: {error.strerror}."
            ) from error
        storage = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        return storage.view(tensor.shape).copy_(tensor)


@dataclass(frozen=True)
class Placement:
    """What memory decides.

    device    what computes
    moments   where the second moments of a block are, but for the one matrix that is worked on
    factors   where the panels of a factor are
    rows      of a linear that are solved at once: whole tiles
    parts     in which the second moments of a block with experts are collected and solved, one after the other
    hidden    where the hidden states are that a forward pass goes on with, of all sequences
    states    whether the guided pass keeps hidden states in the host's memory; else in files, so that it resumes
    unpacked  bytes on the device and on the host in which tuning may keep tensors unpacked; else it unpacks them anew
    """

    device: torch.device
    moments: Location
    factors: Location
    rows: int
    parts: int
    hidden: Location = field(compare=False)
    states: bool = field(default=False, compare=False)
    unpacked: tuple[int, int] = field(default=(0, 0), compare=False)


def locations(device: torch.device, folder: Path) -> list[Location]:
    """From the fastest: the device, the host's memory, and files in `folder`; where each is full, those that follow."""
    found: list[tuple[str, torch.device | Path]] = [("host", HOST), ("disk", folder)]
    if device.type != "cpu":
        found.insert(0, ("device", device))
    return [Location(name, tuple(choice for _, choice in found[i:])) for i, (name, _) in enumerate(found)]


def all_on_device(device: torch.device) -> Placement:
    """Everything on the device and at once."""
    here = Location("device", (device,))
    return Placement(device, here, here, 1 << 62, 1, here)
