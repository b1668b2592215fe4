"""Reads a GGUF file as a Hugging Face model: names, config, decoded weights. What the file says is never trusted."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lqexport.converters.gguf.block_types import first_borrower, first_further, values_per_block
from lqexport.converters.gguf.config import Metadata, config_of
from lqexport.converters.gguf.fused_experts import taken_apart
from lqexport.converters.gguf.header import TensorData
from lqexport.converters.gguf.numbers import with_numbers
from lqexport.converters.gguf.row_order import row_order
from lqexport.converters.gguf.scales import scale_name
from lqexport.converters.gguf.split import read_split
from lqexport.converters.models.architecture import BORROWED, Architecture
from lqexport.converters.models.architectures import ARCHITECTURES, entries_of_gguf
from lqexport.converters.models.rope import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS
from lqexport.converters.models.tensor_names import (
    block_module,
    gguf_names,
    is_grouped_matrix,
    is_three_dimensional,
    model_shape,
    needed_names,
    place_in_stack,
    plain_codec,
)
from lqexport.converters.plan import rows_and_columns
from lqexport.errors import UserError
from lqexport.formats.codec import WHOLE, PlainCodec, Planes
from lqexport.formats.gguf import WITH_SCALE
from lqexport.formats.registry import codec_named, names

EXPERTS, LEADING, WINDOW = "expert_count", "leading_dense_block_count", "attention.sliding_window"
DECODED = "gguf:F32"
"""The codec of matrices that have a further scale and are of a type without a codec for that."""
FACTORS = (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)


class GGUFModel:
    """A model in a GGUF file, or in the files of a split model, memory-mapped.

    It has `names`, `shape`, `read` and `config` as in `lqexport.models.interface.Weights`.

    path       the file, or the first file of a split model
    paths      all files
    metadata   every key of the (first) file, as Python values
    config     the model's config.json, rebuilt from the metadata
    architecture   the entry of the table of architectures that has exactly the file's tensors

    Raises UserError if the file is missing, truncated or not GGUF, or if its architecture or one of its tensors is not
    in the table of architectures.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata, tensors, self.paths = read_split(path)
        name = self.metadata.get("general.architecture")
        same_name = entries_of_gguf(str(name))
        self._tensors = with_numbers(taken_apart(tensors), self.metadata, same_name)
        if self.metadata.get("general.type") == "adapter":
            raise UserError(f"{path} is an adapter, not a model: give it as --adapter beside the model that it is for.")
        self._identify(same_name)

    def _candidates(self, same_name: list[Architecture]) -> list[Architecture]:
        """Returns the entries that have the file's architecture, expanded to its number of experts.

        Entries that have sliding windows if the file does come first.
        """
        name = self.metadata.get("general.architecture")
        experts, leading = (self.metadata.get(f"{name}.{key}", 0) for key in (EXPERTS, LEADING))
        if not same_name:
            known = ", ".join(dict.fromkeys(entry.gguf for entry in ARCHITECTURES if entry.gguf))
            raise UserError(f"{self.path} holds a model of architecture {name!r}. Known: {known}.")
        if not isinstance(experts, int) or not 0 <= experts <= 4096:
            raise UserError(f"{self.path} is damaged: it says that it has {experts} experts.")
        if not isinstance(leading, int) or leading < 0:
            raise UserError(f"{self.path} is damaged: it says that its first {leading} blocks have no experts.")
        marks = {entry.mark: bool(self.metadata.get(f"{name}.{entry.mark}")) for entry in same_name if entry.mark}
        if not experts and all(entry.experts for entry in same_name):
            raise UserError(f"{self.path} is damaged: it gives no {name}.{EXPERTS}.")
        alike = [
            entry
            for entry in same_name
            if bool(entry.experts) == bool(experts)
            and all((entry.mark == mark) == is_true for mark, is_true in marks.items())
        ]
        candidates = [
            entry.expanded(
                experts,
                leading,
                values_per_block(entry, self._tensors),
                first_borrower(entry, self.metadata),
                first_further(entry, self.metadata),
            )
            for entry in alike or same_name
        ]
        windows = f"{name}.{WINDOW}" in self.metadata
        return sorted(candidates, key=lambda entry: (entry.period is not None) != windows)

    def _identify(self, same_name: list[Architecture]) -> None:
        """Sets the architecture to the first candidate that has exactly the file's tensors.

        same_name   the entries of the table that have the file's architecture
        """
        for architecture in (candidates := self._candidates(same_name)):
            self.architecture = architecture
            self._keys = Metadata(str(self.path), architecture, self.metadata)
            try:
                self._names = self._known_names()
                return
            except UserError:
                if architecture is candidates[-1]:
                    raise

    def _known_names(self) -> dict[str, str]:
        """Returns Hugging Face name -> GGUF name of the file's tensors, in the order of the model."""
        # Each block has at least one tensor. Without this limit, a damaged count would make billions of names.
        layers = int(min(self._keys.number("block_count"), len(self._tensors)))
        known = gguf_names(self.architecture, layers)
        unknown = self._tensors.keys() - known.values() - set(FACTORS)
        unknown -= self._borrowed(layers)
        unknown -= self._scales(known)
        stacked = {
            known[name]: 2 if name.endswith(".bias") else 3 for name in known if place_in_stack(name) is not None
        }
        stacked |= {
            known[name]: 3
            for name in known
            if is_grouped_matrix(self.architecture, name) or is_three_dimensional(self.architecture, name)
        }
        for name, tensor in self._tensors.items():
            # ggml does not count leading ones, and a converter may write them.
            counts = {len(tensor.shape), len(_without_leading_ones(tensor.shape))}
            if stacked[name] not in counts if name in stacked else min(counts) > 2:
                unknown.add(name)
        if unknown:
            raise UserError(
                f"{self.path} holds tensors that {self.architecture.gguf} does not have: {sorted(unknown)}."
            )
        if missing := [
            known[name] for name in needed_names(self.architecture, layers) if known[name] not in self._tensors
        ]:
            raise UserError(f"{self.path} has no tensor {', '.join(missing[:5])}.")
        return {name: gguf for name, gguf in known.items() if gguf in self._tensors}

    def _borrowed(self, layers: int) -> set[str]:
        """Returns the names of tensors that are not used, since blocks take the keys and values of earlier ones."""
        entry = self.architecture
        gguf = [name for module, name in entry.gguf_block.items() if module in BORROWED]
        borrowers = range(layers if entry.first_borrower is None else entry.first_borrower, layers)
        return {f"blk.{layer}.{name}.weight" for layer in borrowers for name in gguf}

    def _scales(self, known: dict[str, str]) -> set[str]:
        """Returns the names of the tensors that hold numbers by which llama.cpp multiplies the products of matrices.

        `known` is Hugging Face name -> GGUF name. A file has one float32 for a matrix, or for each of stacked experts.
        """
        matrices = {name: self._tensors[name].shape for name in known.values() if name in self._tensors}
        wanted = {scale_name(name): math.prod(shape[:-2]) for name, shape in matrices.items() if len(shape) > 1}
        scales = {name: self._tensors[name] for name in wanted.keys() & self._tensors.keys()}
        return {
            name
            for name, scale in scales.items()
            if scale.tensor_type == "F32" and math.prod(scale.shape) == wanted[name]
        }

    def _scale(self, name: str) -> np.float32 | None:
        """Returns the number by which llama.cpp multiplies a matrix's products; None if the file has none."""
        stored_name = scale_name(self._names.get(name, ""))
        scale = self._tensors.get(stored_name)
        if scale is None or stored_name in self._stored_names or len(self._tensor(name).shape) < 2:
            return None
        values, place = scale.data.view(np.float32), place_in_stack(name) or 0
        if place >= len(values):
            return None  # `_data` says that there is no such expert
        if not np.isfinite(values[place]):
            raise UserError(f"{self.path}: the scale of {name} is infinite or not a number.")
        return np.float32(values[place])

    @cached_property
    def _stored_names(self) -> frozenset[str]:
        """The GGUF names of the model's own tensors. Gemma 4's router has one that is called like a further scale."""
        return frozenset(self._names.values())

    def names(self) -> list[str]:
        """Returns every tensor's Hugging Face name, in the order of the model."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape as in a checkpoint, rows first."""
        shape = self._tensor(name).shape
        if len(shape) == 1 and self._has_one_row(name):
            return (1, *shape)
        return model_shape(self.architecture, name, shape) if place_in_stack(name) is None else shape[1:]

    def _has_one_row(self, name: str) -> bool:
        module = block_module(self.architecture, name)
        return module is not None and {module[1], f"{module[1]}.{module[2]}"} & set(self.architecture.one_row) != set()

    def codec_name(self, name: str) -> str:
        """Returns the name of a tensor's codec. Raises UserError if its type is not supported."""
        stored = self._stored_codec_name(name)
        return stored if self._scale(name) is None else WITH_SCALE.get(stored, DECODED)

    def _stored_codec_name(self, name: str) -> str:
        codec_name = plain_codec(self.architecture, name, self._tensor(name).tensor_type)
        if codec_name not in names():
            known = ", ".join(entry.removeprefix("gguf:") for entry in names() if entry.startswith("gguf:"))
            raise UserError(
                f"{self.path}: {name} is of the type {codec_name}, which is not supported. Known are {known}."
            )
        return codec_name

    def planes(self, name: str) -> tuple[str, Planes, tuple[int, ...]]:
        """Returns codec name, packed planes and shape of a tensor, with its rows in Hugging Face's order.

        A tensor with a further scale is decoded and multiplied by it, if there is no codec for both.

        Raises UserError if the type is not supported, or does not fit the tensor.
        """
        codec_name, planes, shape = self._stored_planes(name)
        scale = self._scale(name)
        if scale is None:
            return codec_name, planes, shape
        if codec_name in WITH_SCALE:
            return WITH_SCALE[codec_name], planes | {WHOLE: np.array([[scale]])}, shape
        values = codec_named(codec_name).decode(planes, shape[-1]) * scale
        return DECODED, _plain(DECODED).encode_values(values), shape

    def _stored_planes(self, name: str) -> tuple[str, Planes, tuple[int, ...]]:
        """Returns what `planes` does, without a further scale."""
        codec_name, shape = self._stored_codec_name(name), self.shape(name)
        if len(shape) == 1 and not isinstance(codec_named(codec_name), PlainCodec):
            raise UserError(f"{self.path}: {name} is a vector, and of the type {codec_name}, which only matrices have.")
        layout = codec_named(codec_name).layout(*rows_and_columns(shape))
        ((plane, (dtype, stored_shape)),) = layout.items()
        rows = self._data(name).view(dtype).reshape(shape[0], -1)
        order = row_order(self.architecture, self.config, name, shape[0])
        if order is not None:
            rows = rows[np.argsort(order)]
        return codec_name, {plane: rows.reshape(stored_shape)}, shape

    def read(self, name: str) -> NDArray[np.float32]:
        """Returns a tensor's decoded weights, float32, in its shape.

        Raises UserError as `planes`, and if a weight is infinite or not a number.
        """
        codec_name, planes, shape = self.planes(name)
        with np.errstate(invalid="ignore", over="ignore"):  # reported below
            weights = codec_named(codec_name).decode(planes, shape[-1]).reshape(shape)
        if not np.isfinite(weights).all():
            raise UserError(f"{self.path}: {name} holds weights that are infinite or not a number.")
        return weights

    def _data(self, name: str) -> NDArray[np.uint8]:
        """Returns a tensor's bytes; those of an expert are a slice of its block's stacked tensor."""
        tensor, expert = self._tensor(name), place_in_stack(name)
        if expert is None:
            return tensor.data
        if expert >= tensor.shape[0]:
            raise UserError(f"{self.path} has no tensor {name}: it holds {tensor.shape[0]} experts.")
        return tensor.data.reshape(tensor.shape[0], -1)[expert]

    def _tensor(self, name: str) -> TensorData:
        if name not in self._names:
            raise UserError(f"{self.path} has no tensor {name}.")
        return self._tensors[self._names[name]]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of the model's config.json, rebuilt from the metadata and the tensors."""
        factors = {name: self._tensors[name].data.view(np.float32) for name in FACTORS if name in self._tensors}
        vocabulary = self.shape(self.architecture.embedding)[0]
        return config_of(self._keys, vocabulary, set(self._names), factors)


def _without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    first = next((place for place, size in enumerate(shape) if size != 1), len(shape))
    return shape[first:]


def _plain(codec_name: str) -> PlainCodec:
    codec = codec_named(codec_name)
    assert isinstance(codec, PlainCodec)
    return codec
