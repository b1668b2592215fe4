"""Reading a written folder of safetensors as a Hugging Face model: names, config, decoded weights. Trusts nothing in
it. What a packed tensor is made of, each target's own class says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lqexport.converters.folders.stored_tensors import StoredTensors
from lqexport.converters.models.architectures import architecture_of
from lqexport.converters.models.tensor_names import gguf_names, needed_names
from lqexport.converters.plan import PLAIN
from lqexport.errors import MALFORMED, UserError, well_formed
from lqexport.formats.codec import Planes
from lqexport.formats.registry import codec_named
from lqexport.storage.config_check import read_config
from lqexport.storage.files import read_json


def method_of(folder: Path) -> str | None:
    """The `quant_method` of a folder's config.json; None where it has none."""
    path = folder / "config.json"
    found = read_json(path, "").get("quantization_config") if path.is_file() else None
    return str(found.get("quant_method")) if isinstance(found, dict) else None


class FolderModel:
    """A folder with config.json and shards, with `names`, `shape`, `read` and `config` as in
    `lqexport.models.interface.Weights`, and `planes` as in `lqexport.models.written.Packed`.

    Every .safetensors file of the folder is read. Raises UserError where the folder is incomplete or damaged, holds a
    tensor twice, or is of an unknown architecture or one with other tensors.
    """

    container: str
    """What to call such a folder."""
    reader: str
    """Who reads it."""
    parts: tuple[str, ...]
    """Last parts of the names of what a packed tensor is stored as."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = read_config(folder / "config.json", f"{folder} has no config.json.")
        self.stored = StoredTensors(folder, "np")
        self._names = self._known_names()

    def _known_names(self) -> list[str]:
        architecture = architecture_of(self.config)
        layers = self.config.get("num_hidden_layers")
        layers = min(layers, len(self.stored)) if isinstance(layers, int) else 0
        known = gguf_names(architecture, layers)
        stored = {self._tensor_of(name) for name in self.stored}
        if unknown := sorted(stored - {stored for name in known for stored in self.stored_names(name)}):
            raise UserError(f"{self.folder} holds tensors that {architecture.classes[0]} does not have: {unknown[:5]}.")
        present = [name for name in known if stored.issuperset(self.stored_names(name))]
        if missing := [name for name in needed_names(architecture, layers) if name not in present]:
            raise UserError(f"{self.folder} has no tensor {', '.join(missing[:5])}.")
        return present

    def _tensor_of(self, stored: str) -> str:
        """The model's tensor that a stored one is of."""
        key, _, part = stored.rpartition(".")
        return f"{key}.weight" if part in self.parts else stored

    def names(self) -> list[str]:
        """Every tensor's Hugging Face name, in the order of the model."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape as in a checkpoint, rows first."""
        if not self._is_packed(name):
            return self.stored.shape(self.stored_names(name)[0])
        with well_formed(f"{self.folder}: {name}"):
            shapes = [self.packed_shape(key) for key in self._keys(name)]
        return sum(rows for rows, _ in shapes), shapes[0][1]

    def codec_name(self, name: str) -> str:
        """The name of the codec that a tensor is stored in. Raises UserError where readers would not decode it
        rightly."""
        if not self._is_packed(name):
            return PLAIN
        try:
            return self.packed_codec(self._keys(name)[0])
        except MALFORMED as error:
            raise UserError(f"{self.folder}: {self.reader} would not decode {name} rightly. {error}") from error

    def planes(self, name: str) -> tuple[str, Planes, tuple[int, ...]]:
        """Codec name, planes and shape of a tensor. Raises UserError as `codec`."""
        if self._is_packed(name):
            with well_formed(f"{self.folder}: {name}"):
                planes = self.joined([self.packed_planes(key) for key in self._keys(name)])
                return self.codec_name(name), planes, self.shape(name)
        plain = np.ascontiguousarray(self.stored[self.stored_names(name)[0]])
        if plain.dtype != np.float16:
            raise UserError(f"{self.folder}: {name} is {plain.dtype}, not float16.")
        matrix = plain.reshape(1, -1) if plain.ndim == 1 else plain
        return PLAIN, {"blocks": matrix.view(np.uint8)}, plain.shape

    def read(self, name: str) -> NDArray[np.float32]:
        """A tensor's decoded weights, float32, in its shape. Raises UserError where any is infinite or not a number."""
        kind, planes, shape = self.planes(name)
        try:
            weights = codec_named(kind).decode(planes, shape[-1]).reshape(shape)
        except MALFORMED as error:
            raise UserError(f"{self.folder}: {name} is damaged: {error}") from error
        if not np.isfinite(weights).all():
            raise UserError(f"{self.folder}: {name} holds weights that are infinite or not a number.")
        return weights

    def stored_names(self, name: str) -> list[str]:
        """The names that a tensor's rows are stored under, in their order."""
        return [name]

    def joined(self, parts: list[Planes]) -> Planes:
        """The planes of a tensor from those of its parts. Raises UserError where they do not belong together."""
        (planes,) = parts
        return planes

    def packed_shape(self, key: str) -> tuple[int, int]:
        """Rows and columns of the packed tensor `key`.weight."""
        raise NotImplementedError

    def packed_codec(self, key: str) -> str:
        """Its codec. Raises ValueError where readers would not decode it rightly."""
        raise NotImplementedError

    def packed_planes(self, key: str) -> Planes:
        """Its codec's planes."""
        raise NotImplementedError

    def _keys(self, name: str) -> list[str]:
        return [stored.removesuffix(".weight") for stored in self.stored_names(name)]

    def _is_packed(self, name: str) -> bool:
        if name not in self._names:
            raise UserError(f"{self.folder} has no tensor {name}.")
        return self.stored_names(name)[0] not in self.stored
