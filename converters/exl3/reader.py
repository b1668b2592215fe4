"""Reads a folder for ExLlamaV3: one that lqexport wrote, or another's of a model whose tensors have the same names.

ExLlamaV3's loader accepts much that its kernels then read beyond the end, or compute otherwise. Such folders are
refused here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lqexport.converters.exl3.support import rules_of
from lqexport.converters.folders.folder_model import FolderModel
from lqexport.converters.folders.plain_tensors import PLAIN_CODECS, plain_planes
from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.architectures import architecture_of, normalized
from lqexport.converters.models.tensor_names import of_each_expert
from lqexport.errors import UserError
from lqexport.formats.codec import Planes
from lqexport.formats.exl3 import EXL3, MARKERS, WRITTEN_CODEBOOK, signs
from lqexport.formats.trellis import SIDE, padded

Shapes = dict[str, tuple[int, ...]]
SCALES = {"suh": "su", "svh": "sv"}
"""Scales of a linear -> the signs that older files have instead."""


class Exl3Model(FolderModel):
    """A model in an EXL3 folder. A tensor's codec follows from the shape of its trellis and from its marker.

    shapes_of   config -> name and shape of every tensor of the model. The folder holds padded matrices
    """

    container, reader, framework = "ExLlamaV3 folder", "ExLlamaV3", "pt"
    parts = ("trellis", *SCALES, *SCALES.values(), *MARKERS)

    def __init__(self, folder: Path, shapes_of: Callable[[dict[str, Any]], Shapes]) -> None:
        self._shapes_of = shapes_of
        super().__init__(folder)
        self._check_twice()
        self._check_biases()
        self._check_experts()

    @functools.cached_property
    def _architecture(self) -> Architecture:
        return architecture_of(self.config)

    @functools.cached_property
    def _normalized(self) -> dict[str, Any]:
        return normalized(self.config)

    @functools.cached_property
    def _shapes(self) -> Shapes:
        shapes = self._shapes_of(self.config)
        return {self._architecture.output: shapes[self._architecture.embedding]} | shapes

    def stored_names(self, name: str) -> list[str]:
        return rules_of(self._normalized).naming.stored_names(self._architecture, name)

    def shape(self, name: str) -> tuple[int, ...]:
        if self._is_packed(name):
            return self._shape_of_packed(name)
        shape = self.stored.shape(self.stored_names(name)[0])
        weight = f"{name.removesuffix('.bias')}.weight"
        if name.endswith(".bias") and weight in self._names and self._is_packed(weight):
            rows = self._shape_of_packed(weight)[0]
            if shape != (padded(rows),):
                raise UserError(f"{self.folder}: {name} has {list(shape)} numbers, and its linear {padded(rows)} rows.")
            return (rows,)
        return shape

    def codec_name(self, name: str) -> str:
        return super().codec_name(name) if self._is_packed(name) else self._plain(name)[0]

    def planes(self, name: str) -> tuple[str, Planes, tuple[int, ...]]:
        if self._is_packed(name):
            self.codec_name(name)  # says what is wrong before anything is read
            return super().planes(name)
        codec_name, plain = self._plain(name)
        shape = self.shape(name)
        plain = plain[: shape[0]].contiguous() if plain.dim() else plain
        return codec_name, plain_planes(plain), shape

    def joined(self, pieces: list[Planes]) -> Planes:
        if any(not np.array_equal(piece["suh"], pieces[0]["suh"]) for piece in pieces):
            raise UserError(f"{self.folder} holds parts of a fused linear that have other suh: not by lqexport.")
        return pieces[0] | {
            "trellis": np.concatenate([piece["trellis"] for piece in pieces], axis=1),
            "svh": np.concatenate([piece["svh"] for piece in pieces]),
        }

    def packed_codec(self, key: str) -> str:
        codebook = self._codebook(key)
        width = self._trellis_shape(key)[2]
        name = f"exl3:{width / SIDE:g}{'' if codebook == WRITTEN_CODEBOOK else f'-{codebook}'}"
        if name not in EXL3:
            raise ValueError(f"Its trellis has {width / SIDE:g} bits with the codebook {codebook}, which do not exist.")
        for scales, size in zip(SCALES, (padded(size) for size in reversed(self._piece(key))), strict=True):
            self._check_scales(key, scales, size)
        return name

    def packed_planes(self, key: str) -> Planes:
        rows, columns = self._piece(key)
        return {
            "trellis": self.stored[f"{key}.trellis"].contiguous().numpy(),
            "suh": self._scales(key, "suh")[:columns],
            "svh": self._cut_outputs(key, rows),
        }

    def _plain(self, name: str) -> tuple[str, torch.Tensor]:
        plain = self.stored[self.stored_names(name)[0]]
        if plain.dtype not in PLAIN_CODECS:
            raise UserError(f"{self.folder}: {name} is {plain.dtype}, not a float of 16 or 32 bits.")
        return PLAIN_CODECS[plain.dtype], plain

    def _shape_of_packed(self, name: str) -> tuple[int, int]:
        """Returns rows and columns of a matrix without its padding. Raises UserError if the model has none such."""
        if len(shape := self._shapes.get(name, ())) != 2:
            raise UserError(f"{self.folder}: {name} is stored in EXL3, and is no matrix of the model.")
        return shape[0], shape[1]

    @functools.cached_property
    def _pieces(self) -> dict[str, tuple[int, int]]:
        """Module of the folder -> rows and columns of the matrix that it holds."""
        naming = rules_of(self._normalized).naming
        shapes: dict[str, tuple[int, int]] = {}
        for name in self._names:
            if self._is_packed(name):
                rows, columns = self._shape_of_packed(name)
                pieces = naming.pieces(self._architecture, self._normalized, name, rows)
                shapes |= {
                    stored.removesuffix(".weight"): (end - begin, columns) for stored, (begin, end) in pieces.items()
                }
        return shapes

    def _piece(self, key: str) -> tuple[int, int]:
        return self._pieces[key]

    def _trellis_shape(self, key: str) -> tuple[int, int, int]:
        """Returns the shape of a trellis. Raises ValueError if it is not that of the model's matrix."""
        shape, dtype = self.stored.shape(f"{key}.trellis"), self.stored.dtype(f"{key}.trellis")
        rows, columns = (padded(size) for size in self._piece(key))
        if dtype != "I16" or len(shape) != 3 or shape[:2] != (columns // SIDE, rows // SIDE):
            wanted = f"I16 [{columns // SIDE}, {rows // SIDE}, 16 K]"
            raise ValueError(f"Its trellis is {dtype} {list(shape)}, and that of the model's matrix is {wanted}.")
        return shape[0], shape[1], shape[2]

    def _codebook(self, key: str) -> str:
        """Returns the codebook that a linear's marker names. Raises ValueError for a wrong marker, or two."""
        markers = [name for name in MARKERS if f"{key}.{name}" in self.stored]
        if len(markers) > 1:
            raise ValueError(f"It has the markers of two codebooks, {' and '.join(markers)}.")
        for name in markers:
            shape, dtype = self.stored.shape(f"{key}.{name}"), self.stored.dtype(f"{key}.{name}")
            if shape not in ((), (1,)) or dtype != "I32":
                raise ValueError(f"Its marker {name} is {dtype} {list(shape)}, not one number in I32.")
            if (value := int(self.stored[f"{key}.{name}"]) & 0xFFFFFFFF) != MARKERS[name]:
                raise ValueError(f"Its marker {name} holds {value:#x}, not {MARKERS[name]:#x}.")
        return markers[0] if markers else "3inst"

    def _check_scales(self, key: str, scales: str, size: int) -> None:
        """Raises ValueError if a linear's scales are missing, there twice, or of another dtype or length."""
        names = [name for name in (scales, SCALES[scales]) if f"{key}.{name}" in self.stored]
        if len(names) != 1:
            raise ValueError(
                f"It has {' and '.join(names) or f'no {scales}'}; one of {scales} and {SCALES[scales]} belongs to it."
            )
        (name,) = names
        dtypes, count = (("F16", "BF16"), size) if name == scales else (("I16",), size // 16)
        shape, dtype = self.stored.shape(f"{key}.{name}"), self.stored.dtype(f"{key}.{name}")
        if dtype not in dtypes or shape != (count,):
            raise ValueError(f"Its {name} is {dtype} {list(shape)}, not {dtypes[0]} [{count}].")

    def _scales(self, key: str, scales: str) -> np.ndarray:
        """Returns the padded scales of a linear, float16."""
        if f"{key}.{scales}" in self.stored:
            return np.ascontiguousarray(self.stored[f"{key}.{scales}"].half().numpy())
        return signs(self.stored[f"{key}.{SCALES[scales]}"].numpy())

    def _cut_outputs(self, key: str, rows: int) -> np.ndarray:
        """Returns the scales of a linear's outputs, without the padding.

        Raises ValueError if those of the padding are not zero: its outputs would be inputs of the next linear.
        """
        outputs = self._scales(key, "svh")
        if outputs[rows:].any():
            raise ValueError(f"svh of {key} is not zero beyond its {rows} outputs.")
        return outputs[:rows]

    def _check_twice(self) -> None:
        """Raises UserError if a linear is in EXL3 and in floats, of which ExLlamaV3 takes one."""
        for name in self.stored:
            key = name.removesuffix(".weight")
            if name.endswith(".weight") and f"{key}.trellis" in self.stored:
                raise UserError(f"{self.folder} holds {key} twice, in EXL3 and as {name}.")

    def _check_biases(self) -> None:
        """Raises UserError for a bias that the model does not have: ExLlamaV3 adds it, and nothing else does."""
        for name in self._names:
            weight = f"{name.removesuffix('.bias')}.weight"
            if (
                name.endswith(".bias")
                and name not in self._shapes
                and weight in self._names
                and self._is_packed(weight)
            ):
                raise UserError(f"{self.folder} holds {name}, and the model has no such bias; ExLlamaV3 would add it.")

    def _check_experts(self) -> None:
        """Raises UserError if experts' matrices that ExLlamaV3 runs together have other bits or codebooks."""
        seen: dict[str, tuple[str, str]] = {}
        for name in self._names:
            group = of_each_expert(name)
            if group == name or not self._is_packed(name):
                continue
            codec_name = self.codec_name(name)
            first, other = seen.setdefault(group, (name, codec_name))
            if other != codec_name:
                raise UserError(
                    f"{self.folder}: {name} is in {codec_name} and {first} in {other}, and ExLlamaV3 runs the experts "
                    "of a block together, in one."
                )
