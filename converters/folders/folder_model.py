"""Reads a written folder of safetensors as a Hugging Face model: names, config, decoded weights.

Each target has a subclass that knows the stored tensors of a packed linear. What the folder says is never trusted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

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
from lqexport.storage.files import optional_json


def method_of(folder: Path) -> str | None:
    """Returns `quant_method` of a folder's config.json; None if it has no quantization_config."""
    quantization = optional_json(folder / "config.json").get("quantization_config")
    return str(quantization.get("quant_method")) if isinstance(quantization, dict) else None


class FolderModel:
    """The base class of a model in a folder with config.json and shards.

    It has `names`, `shape`, `read` and `config` as in `lqexport.models.interface.Weights`, and `planes` as in
    `lqexport.models.written.Packed`. Every .safetensors file of the folder is read.

    Raises UserError if the folder is incomplete or damaged, if it holds a tensor twice, if the architecture is unknown,
    or if it has other tensors than the architecture.
    """

    container: str
    """Name of such a folder, for listings."""
    reader: str
    """Name of the programs that read such a folder, for messages."""
    framework: Literal["np", "pt"] = "np"
    """What `stored` gives: NumPy arrays, or torch tensors, which may be of bfloat16."""
    parts: tuple[str, ...]
    """Last parts of the names of a packed tensor's stored tensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = read_config(folder / "config.json", f"{folder} has no config.json.")
        self.stored = StoredTensors(folder, self.framework)
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
        """Returns the name of the model's tensor that a stored tensor belongs to."""
        key, _, part = stored.rpartition(".")
        return f"{key}.weight" if part in self.parts else stored

    def names(self) -> list[str]:
        """Returns every tensor's Hugging Face name, in the order of the model."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape as in a checkpoint, rows first."""
        if not self._is_packed(name):
            return self.stored.shape(self.stored_names(name)[0])
        with well_formed(f"{self.folder}: {name}"):
            shapes = [self.packed_shape(key) for key in self._keys(name)]
        return sum(rows for rows, _ in shapes), shapes[0][1]

    def codec_name(self, name: str) -> str:
        """Returns the name of a tensor's codec. Raises UserError if readers of the folder would decode other values."""
        if not self._is_packed(name):
            return PLAIN
        try:
            return self.packed_codec(self._keys(name)[0])
        except MALFORMED as error:
            raise UserError(f"{self.folder}: {self.reader} would not decode {name} rightly. {error}") from error

    def planes(self, name: str) -> tuple[str, Planes, tuple[int, ...]]:
        """Returns codec name, planes and shape of a tensor.

        Raises UserError as `codec_name` does, and if the tensor is damaged or of a wrong dtype.
        """
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
        """Returns a tensor's decoded weights, float32, in its shape.

        Raises UserError as `planes` does, and if a weight is infinite or not a number.
        """
        codec_name, planes, shape = self.planes(name)
        try:
            weights = codec_named(codec_name).decode(planes, shape[-1]).reshape(shape)
        except MALFORMED as error:
            raise UserError(f"{self.folder}: {name} is damaged: {error}") from error
        if not np.isfinite(weights).all():
            raise UserError(f"{self.folder}: {name} holds weights that are infinite or not a number.")
        return weights

    def stored_names(self, name: str) -> list[str]:
        """Returns the names under which a tensor's rows are stored, in the order of the rows."""
        return [name]

    def joined(self, pieces: list[Planes]) -> Planes:
        """Returns the planes of a tensor from those of its pieces. Raises UserError if they do not belong together."""
        (planes,) = pieces
        return planes

    def packed_shape(self, key: str) -> tuple[int, int]:
        """Returns rows and columns of the packed tensor `key`.weight."""
        raise NotImplementedError

    def packed_codec(self, key: str) -> str:
        """Returns the codec name of `key`.weight.

        Raises ValueError if readers of the folder would decode other values.
        """
        raise NotImplementedError

    def packed_planes(self, key: str) -> Planes:
        """Returns the planes of `key`.weight, as its codec has them."""
        raise NotImplementedError

    def _keys(self, name: str) -> list[str]:
        return [stored.removesuffix(".weight") for stored in self.stored_names(name)]

    def _is_packed(self, name: str) -> bool:
        if name not in self._names:
            raise UserError(f"{self.folder} has no tensor {name}.")
        return self.stored_names(name)[0] not in self.stored
