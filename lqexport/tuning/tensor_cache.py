"""Unpacks the tensors of a solved artifact for tuning, and keeps them unpacked where memory allows it.

Tuning needs every tensor twice for each sequence, and unpacking is slow: the codecs do it in NumPy, on the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lqexport.formats.codec import Grid, PlainCodec, Sections, TrellisCodec
from lqexport.formats.registry import codec_named
from lqexport.formats.trellis import Walks
from lqexport.grids.grid import TensorGrid
from lqexport.grids.rotation import TensorWalks, unscaled
from lqexport.grids.sections import TensorSections
from lqexport.models.source_grids import KEPT
from lqexport.storage.artifact import Artifact, StoredTensor, decoded

NUMBERS = 0.5
"""Bytes of a grid's scales, offsets and tables for each code, at most."""


@dataclass(frozen=True)
class Unpacked:
    """A solved tensor, unpacked on a device.

    grid    the tensor's grid, the scales of its walks, or None
    codes   uint8 [R, C]; of walks, float16 [R, C] (`rotation.unscaled`); if there is no grid, the tensor's values

    There is no grid if the tensor is stored as plain numbers. There is none either if the tensor keeps the grid of a
    quantized source: it has no error that tuning could reduce.
    """

    grid: TensorGrid | TensorSections | TensorWalks | None
    codes: Tensor


OnHost = tuple[Grid | Sections | Walks | None, Tensor]
"""A tensor's grid and codes on the host, as the codecs return them; grid and codes are as in `Unpacked`."""


def unpack(tensor: StoredTensor, device: torch.device) -> Unpacked:
    """Returns a tensor unpacked on a device."""
    return _moved_to(device, _on_host(tensor))


def _on_host(tensor: StoredTensor) -> OnHost:
    codec = codec_named(tensor.codec_name)
    if isinstance(codec, PlainCodec) or tensor.facts.get("source_grid") == KEPT:
        return None, torch.from_numpy(decoded(tensor))
    if isinstance(codec, TrellisCodec):
        walks = codec.unpack(tensor.planes, tensor.shape[1])
        return walks, torch.from_numpy(unscaled(walks))
    grid, codes = codec.unpack(tensor.planes, tensor.shape[1])
    return grid, torch.from_numpy(codes)


def _moved_to(device: torch.device, on_host: OnHost) -> Unpacked:
    grid, codes = on_host[0], on_host[1].to(device)
    if grid is None:
        return Unpacked(None, codes)
    if isinstance(grid, Walks):
        return Unpacked(TensorWalks.of(grid, device), codes)
    return Unpacked(TensorGrid.of(grid, device) if isinstance(grid, Grid) else TensorSections.of(grid, device), codes)


class TensorCache:
    """The unpacked tensors of an artifact, by name.

    They are kept on the device while there is room, then on the host. Tensors that fit nowhere are read again each
    time.

    cache_bytes   bytes that may be used on the device and on the host
    """

    def __init__(self, artifact: Artifact, device: torch.device, cache_bytes: tuple[int, int]) -> None:
        self._artifact, self._device = artifact, device
        self._device_bytes, self._host_bytes = cache_bytes  # what is left of them
        self._on_device: dict[str, Unpacked] = {}
        self._on_host: dict[str, OnHost] = {}

    def __getitem__(self, name: str) -> Unpacked:
        if name in self._on_device:
            return self._on_device[name]
        on_host = self._on_host.get(name) or _on_host(self._artifact.read(name))
        unpacked, size = _moved_to(self._device, on_host), _size(on_host)
        if size <= self._device_bytes:
            self._on_device[name] = unpacked
            self._device_bytes -= size
        elif name not in self._on_host and size <= self._host_bytes:
            self._on_host[name] = on_host
            self._host_bytes -= size
        return unpacked


def _size(on_host: OnHost) -> int:
    """Returns the bytes that an unpacked tensor takes, at most."""
    grid, codes = on_host
    if grid is None or isinstance(grid, Walks):
        return codes.nbytes
    return int((1 + NUMBERS) * codes.nbytes)
