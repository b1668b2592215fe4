"""Reads a folder of the native format as a Hugging Face model: names, config, planes.

It reads folders that `converters.folders.native` wrote, and folders that transformers saved after it had loaded such a
one. What the folder says is never trusted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lqexport.converters.factors import factor_names
from lqexport.converters.folders.native import LOW_RANK, METHOD, VERSION, stored_names
from lqexport.converters.folders.plain_tensors import PLAIN_CODECS, plain_planes
from lqexport.converters.folders.stored_tensors import StoredTensors
from lqexport.converters.models.architectures import architecture_of
from lqexport.converters.models.tensor_names import gguf_names
from lqexport.errors import UserError, well_formed
from lqexport.formats.codec import Planes
from lqexport.formats.registry import names
from lqexport.storage.artifact import StoredTensor, decoded
from lqexport.storage.config_check import read_config


class NativeModel:
    """A model in a folder with config.json and native shards.

    It has `names`, `shape`, `read` and `config` as in `lqexport.models.interface.Weights`, and `planes` as in
    `lqexport.models.written.Packed`. Low-rank factors have the names of `converters.factors`.

    Raises UserError if the folder is incomplete or damaged, or holds tensors that config.json does not explain.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = read_config(folder / "config.json", f"{folder} has no config.json.")
        self._tensors = StoredTensors(folder, "pt")
        self._packed = _packed(folder, self.config)
        self._factors = _factors(self._packed)
        self._names = self._known_names()

    def _known_names(self) -> list[str]:
        architecture = architecture_of(self.config)
        layers = self.config.get("num_hidden_layers")
        known = gguf_names(architecture, min(layers, len(self._tensors)) if isinstance(layers, int) else 0)
        expected = {stored for name in self._packed for stored in self._stored(name).values()}
        expected |= set(self._factors.values())
        if missing := sorted(expected - self._tensors.keys()):
            raise UserError(f"{self.folder} has no tensor {', '.join(missing[:5])}.")
        present = self._packed.keys() | (self._tensors.keys() - expected)
        if unknown := sorted(present - known.keys()):
            raise UserError(f"{self.folder} holds tensors that its config.json does not explain: {unknown[:5]}.")
        return [name for name in known if name in present]

    def names(self) -> list[str]:
        """Returns every tensor's Hugging Face name, in the order of the model."""
        return list(self._names)

    def factors(self) -> list[str]:
        """Returns the names of the low-rank factors."""
        return list(self._factors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape as in a checkpoint, rows first."""
        if name in self._packed:
            return tuple(self._packed[name]["shape"])
        stored = self._factors.get(name, name)
        return self._tensors.shape(stored)

    def codec_name(self, name: str) -> str:
        """Returns the name of a tensor's codec."""
        return self._packed[name]["codec"] if name in self._packed else self.planes(name)[0]

    def planes(self, name: str) -> tuple[str, Planes, tuple[int, ...]]:
        """Returns codec name, planes and shape of a tensor or low-rank factor.

        Raises UserError if the folder has no such tensor, or if it is damaged.
        """
        if name not in self._packed:
            return self._plain(name)
        rows, columns = self._packed[name]["shape"]
        with well_formed(f"{self.folder}: {name}"):
            planes = {plane: self._tensors[stored].numpy() for plane, stored in self._stored(name).items()}
        if planes["codes"].size % rows:
            raise UserError(f"{self.folder}: {name} does not hold the codes of {rows} rows.")
        planes["codes"] = planes["codes"].reshape(rows, -1)
        return self._packed[name]["codec"], planes, (rows, columns)

    def read(self, name: str) -> NDArray[np.float32]:
        """Returns a tensor's decoded weights, float32, in its shape, without its low-rank correction."""
        codec_name, planes, shape = self.planes(name)
        return decoded(StoredTensor(name, codec_name, shape, planes))

    def _stored(self, name: str) -> dict[str, str]:
        return stored_names(self._packed[name]["codec"], name.removesuffix(".weight"))

    def _plain(self, name: str) -> tuple[str, Planes, tuple[int, ...]]:
        tensor = self._tensors[self._factors.get(name, name)]
        if tensor.dtype not in PLAIN_CODECS or tensor.dim() not in (1, 2) or tensor.numel() == 0:
            raise UserError(f"{self.folder}: {name} should be of floating-point numbers, in one or two dimensions.")
        return PLAIN_CODECS[tensor.dtype], plain_planes(tensor), tuple(tensor.shape)


def _packed(folder: Path, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the packed weights of config.json: name -> codec, shape and, for a corrected linear, rank.

    Raises UserError if config.json is not that of a native folder, or is malformed.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        raise UserError(f"{folder} is no native folder: its config.json has no quantization_config of {METHOD}.")
    if quantization.get("version") != VERSION:
        raise UserError(
            f"{folder} is of version {quantization.get('version')} of the format; this lqexport reads {VERSION}."
        )
    modules = quantization.get("modules")
    if not isinstance(modules, dict) or not all(map(_is_entry, modules.values())):
        raise UserError(f"{folder}: quantization_config of config.json should list modules with codec and shape.")
    return {f"{name}.weight": entry for name, entry in modules.items()}


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.get("codec") not in names("native"):
        return False
    shape, rank = entry.get("shape"), entry.get("rank", 1)
    numbers = [*shape, rank] if isinstance(shape, list) and len(shape) == 2 else [0]
    return all(type(number) is int and number > 0 for number in numbers)  # True is an int


def _factors(packed: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Returns low-rank factor -> its name in the file."""
    stored_factors: dict[str, str] = {}
    for name, entry in packed.items():
        if "rank" in entry:
            stored = (name.removesuffix(".weight") + side for side in LOW_RANK.values())
            stored_factors |= zip(factor_names(name), stored, strict=True)
    return stored_factors
