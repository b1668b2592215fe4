"""Reads a folder of mlx-lm: one that lqexport wrote, or another of a model whose tensors have the same names."""

from __future__ import annotations

import torch

from lqexport.converters.folders.folder_model import FolderModel
from lqexport.converters.folders.plain_tensors import plain_planes
from lqexport.converters.mlx.names import expert_of, stored_name
from lqexport.converters.mlx.types import PLAIN, of_settings
from lqexport.errors import UserError
from lqexport.formats.codec import Planes
from lqexport.formats.registry import codec_named

PARTS = ("scales", "biases")
PLAIN_CODECS = {torch.bfloat16: PLAIN[False], torch.float16: PLAIN[True]}
"""Dtype of a tensor that is not quantized -> its codec."""


class MlxModel(FolderModel):
    """A model in an MLX folder. A tensor's codec follows from `quantization` of config.json."""

    container, reader, framework = "MLX folder", "mlx-lm", "pt"
    parts = PARTS
    _last: tuple[str, Planes] = ("", {})

    def stored_names(self, name: str) -> list[str]:
        return [stored_name(self._model_type, name)]

    @property
    def _model_type(self) -> str:
        return str(self.config.get("model_type"))

    def shape(self, name: str) -> tuple[int, ...]:
        if self._is_packed(name) or expert_of(self._model_type, name) is None:
            return super().shape(name)
        return self.stored.shape(self.stored_names(name)[0])[1:]

    def codec_name(self, name: str) -> str:
        if self._is_packed(name):
            return super().codec_name(name)
        return self._plain_codec(name, self.stored[self.stored_names(name)[0]])

    def planes(self, name: str) -> tuple[str, Planes, tuple[int, ...]]:
        expert = expert_of(self._model_type, name)
        if self._is_packed(name):
            codec_name, planes, shape = super().planes(name)
            return codec_name, planes if expert is None else {key: of[expert] for key, of in planes.items()}, shape
        plain = self.stored[self.stored_names(name)[0]]
        plain = (plain if expert is None else plain[expert]).contiguous()
        return self._plain_codec(name, plain), plain_planes(plain), tuple(plain.shape)

    def packed_shape(self, key: str) -> tuple[int, int]:
        *_, rows, groups = self.stored.shape(f"{key}.scales")
        return rows, groups * codec_named(self.packed_codec(key)).block

    def packed_codec(self, key: str) -> str:
        quantization = self.config.get("quantization") or {}
        of_module = quantization.get(key)
        if not isinstance(of_module, dict):
            of_module = {name: quantization[name] for name in ("group_size", "bits", "mode") if name in quantization}
        return of_settings(of_module, self.stored[f"{key}.scales"].dtype == torch.float16)

    def packed_planes(self, key: str) -> Planes:
        if self._last[0] != key:  # the experts of a block follow each other
            self._last = key, self._read_planes(key)
        return self._last[1]

    def _read_planes(self, key: str) -> Planes:
        forms = codec_named(self.packed_codec(key)).layout(*self.packed_shape(key))
        stored = {plane: self.stored[f"{key}.{plane}"].contiguous().view(torch.uint8).numpy() for plane in forms}
        return {plane: stored[plane].view(dtype) for plane, (dtype, _) in forms.items()}

    def _plain_codec(self, name: str, plain: torch.Tensor) -> str:
        if plain.dtype not in PLAIN_CODECS:
            raise UserError(f"{self.folder}: {name} is {plain.dtype}, not bfloat16 or float16.")
        return PLAIN_CODECS[plain.dtype]

    def _is_packed(self, name: str) -> bool:
        if name not in self._names:
            raise UserError(f"{self.folder} has no tensor {name}.")
        return f"{self.stored_names(name)[0].removesuffix('.weight')}.scales" in self.stored
