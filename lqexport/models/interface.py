"""The interface of source models and exports: a config, and named weights that are read one tensor at a time."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class ModelShapes(Protocol):
    """A model's config, and the Hugging Face names and shapes of its tensors.

    Tied embeddings: `lm_head.weight` is absent and `config["tie_word_embeddings"]` is true.
    """

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""

    def names(self) -> list[str]:
        """Returns the names of all tensors, in the order of the model."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape without reading its data."""


class Weights(ModelShapes, Protocol):
    """A model's config and tensors."""

    def read(self, name: str) -> torch.Tensor:
        """Returns one tensor on the CPU, in the dtype it is stored in; packed tensors are decoded to float32.

        Raises UserError if the data is missing or damaged.
        """
