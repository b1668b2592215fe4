"""Unpacks the tensors of a solved artifact for tuning, and keeps them unpacked where memory allows it.

Tuning needs every tensor twice for each sequence, and unpacking is slow: the codecs do it in NumPy, on the host. Only
walks, the slowest of all, are decoded by the CUDA kernels where these run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lqexport.formats.codec import Grid, PlainCodec, Sections, TrellisCodec
from lqexport.formats.registry import codec_named
from lqexport.formats.trellis import Walks
from lqexport.grids.grid import TensorGrid
from lqexport.grids.rotation import TensorWalks, unscaled
from lqexport.grids.sections import TensorSections
from lqexport.kernels import cuda, cuda_decode
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


Parts = tuple[Grid | Sections | TensorWalks | None, Tensor]
"""A tensor's grid and codes on the host; they are as in `Unpacked`. Codes that a CUDA kernel has decoded are still
on the device."""


def unpack(tensor: StoredTensor, device: torch.device) -> Unpacked:
    """Returns a tensor unpacked on a device."""
    return _moved_to(device, _parts(tensor, device))


def _parts(tensor: StoredTensor, device: torch.device) -> Parts:
    codec = codec_named(tensor.codec_name)
    if isinstance(codec, PlainCodec) or tensor.facts.get("source_grid") == KEPT:
        return None, torch.from_numpy(decoded(tensor))
    if isinstance(codec, TrellisCodec):
        walks = codec.unpack(tensor.planes, tensor.shape[1])
        return TensorWalks.of(walks, torch.device("cpu")), _codes_of(walks, tensor, device)
    grid, codes = codec.unpack(tensor.planes, tensor.shape[1])
    return grid, torch.from_numpy(codes)


def _codes_of(walks: Walks, tensor: StoredTensor, device: torch.device) -> Tensor:
    """Returns `rotation.unscaled` of a tensor's walks, decoded on `device` if the CUDA kernels run there."""
    if not cuda.usable(device):
        return torch.from_numpy(unscaled(walks))
    planes = tensor.planes | {"suh": np.ones_like(walks.inputs), "svh": np.ones_like(walks.outputs)}
    return cuda_decode.decode_arrays(tensor.codec_name, planes, tensor.shape[1], device, torch.float16)


def _moved_to(device: torch.device, parts: Parts) -> Unpacked:
    grid, codes = parts[0], parts[1].to(device)
    if grid is None:
        return Unpacked(None, codes)
    if isinstance(grid, TensorWalks):
        return Unpacked(TensorWalks(grid.inputs.to(device), grid.outputs.to(device)), codes)
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
        self._on_host: dict[str, Parts] = {}

    def __getitem__(self, name: str) -> Unpacked:
        if name in self._on_device:
            return self._on_device[name]
        parts = self._on_host.get(name) or _parts(self._artifact.read(name), self._device)
        unpacked, size = _moved_to(self._device, parts), _size(parts)
        if size <= self._device_bytes:
            self._on_device[name] = unpacked
            self._device_bytes -= size
        elif name not in self._on_host and size <= self._host_bytes:
            self._on_host[name] = parts[0], parts[1].cpu()
            self._host_bytes -= size
        return unpacked


def _size(parts: Parts) -> int:
    """Returns the bytes that an unpacked tensor takes, at most."""
    grid, codes = parts
    if grid is None or isinstance(grid, TensorWalks):
        return codes.nbytes
    return int((1 + NUMBERS) * codes.nbytes)
