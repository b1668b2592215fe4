"""The tensors of a solved artifact as tuning works with them, unpacked once where memory allows it.

Unpacking is the codecs' NumPy, on the host; tuning needs every tensor twice for each sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lqexport.formats.codec import Grid, PlainCodec, Sections
from lqexport.formats.registry import codec_named
from lqexport.grids.grid import TensorGrid
from lqexport.grids.sections import TensorSections
from lqexport.models.source_grids import KEPT
from lqexport.storage.artifact import Artifact, StoredTensor, decoded

NUMBERS = 0.5
"""Bytes of a grid's numbers for each code, at most."""


@dataclass(frozen=True)
class Unpacked:
    """A solved tensor's grid, with `codes` uint8 [R, C]. None as the grid: `codes` are the values themselves, of a
    tensor that is stored as it is, or that has the source's own grid and no error that tuning could make smaller."""

    grid: TensorGrid | TensorSections | None
    codes: Tensor


Parts = tuple[Grid | Sections | None, Tensor]
"""The same on the host, as the codecs have it."""


def unpack(tensor: StoredTensor, device: torch.device) -> Unpacked:
    """A tensor's grid and codes on the device."""
    return _on(device, _parts(tensor))


def _parts(tensor: StoredTensor) -> Parts:
    kind = codec_named(tensor.codec_name)
    if isinstance(kind, PlainCodec) or tensor.facts.get("source_grid") == KEPT:
        return None, torch.from_numpy(decoded(tensor))
    grid, codes = kind.unpack(tensor.planes, tensor.shape[1])
    return grid, torch.from_numpy(codes)


def _on(device: torch.device, parts: Parts) -> Unpacked:
    grid, codes = parts[0], parts[1].to(device)
    if grid is None:
        return Unpacked(None, codes)
    return Unpacked(TensorGrid.of(grid, device) if isinstance(grid, Grid) else TensorSections.of(grid, device), codes)


class Shelf:
    """An artifact's tensors by name, unpacked. They are kept on the device as far as there is room, then on the host.

    cache_bytes   bytes on the device and on the host
    """

    def __init__(self, artifact: Artifact, device: torch.device, cache_bytes: tuple[int, int]) -> None:
        self._artifact, self._device = artifact, device
        self._device_room, self._host_room = cache_bytes
        self._made: dict[str, Unpacked] = {}
        self._parts: dict[str, Parts] = {}

    def __getitem__(self, name: str) -> Unpacked:
        if name in self._made:
            return self._made[name]
        parts = self._parts.get(name) or _parts(self._artifact.read(name))
        made, size = _on(self._device, parts), _size(parts)
        if size <= self._device_room:
            self._made[name] = made
            self._device_room -= size
        elif name not in self._parts and size <= self._host_room:
            self._parts[name] = parts
            self._host_room -= size
        return made


def _size(parts: Parts) -> int:
    grid, codes = parts
    return codes.nbytes if grid is None else int((1 + NUMBERS) * codes.nbytes)
