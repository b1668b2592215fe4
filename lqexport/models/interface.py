"""What a source model and an export have in common: a config and named weights, read one tensor at a time."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class ModelShapes(Protocol):
    """Names and shapes of a model's tensors, by their Hugging Face names, and its config.

    Tied embeddings: `lm_head.weight` is absent and `config["tie_word_embeddings"]` is true.
    """

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""

    def names(self) -> list[str]:
        """Every tensor's name, in the order of the model."""

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading its data."""


class Weights(ModelShapes, Protocol):
    """A model's tensors."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in the dtype it is stored in (packed tensors: float32).

        Raises UserError where the data is missing or damaged.
        """
