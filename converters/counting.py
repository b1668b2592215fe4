"""Counts a model's weights, and the bits that they take: alike for plans, artifacts, files and comparisons."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from lqexport.converters.factors import corrected_linear, is_factor
from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.architectures import architecture_of
from lqexport.converters.models.tensor_names import is_linear, is_tied


class Sized(Protocol):
    """A stored tensor, of a plan or of a file."""

    @property
    def name(self) -> str:
        """The Hugging Face name."""

    @property
    def weights(self) -> int:
        """The number of its values."""

    @property
    def nbytes(self) -> int:
        """The bytes of its data."""


@dataclass(frozen=True)
class Count:
    """The weights of a model or of a part of it, and the bytes that they take with scales, tables and corrections."""

    weights: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """8 times the bytes, divided by the number of weights."""
        return 8 * self.nbytes / max(1, self.weights)


def copied_output(config: dict[str, Any]) -> str | None:
    """Returns the name that an output of its own has in a file, if the output of this config.json is its embedding."""
    return architecture_of(config).output if is_tied(config) else None


def counted(tensors: Iterable[Sized], copied: str | None) -> Count:
    """Returns the count of a whole model.

    copied   the output's name in a model whose output is its embedding (`copied_output`); None for any other

    Two sorts of tensors take bytes and add no weights: low-rank factors, and an output of its own in the file of a
    model whose output is its embedding (EXL2, EXL3). Files of one model are therefore compared at equal numbers of
    weights.
    """
    listed = list(tensors)
    weights = sum(tensor.weights for tensor in listed if not is_factor(tensor.name) and tensor.name != copied)
    return Count(weights, sum(tensor.nbytes for tensor in listed))


def counted_linears(tensors: Iterable[Sized], architecture: Architecture) -> Count:
    """Returns the count of the decoder blocks' linears with their low-rank factors, without embedding and output."""
    return counted([tensor for tensor in tensors if is_linear(architecture, _weight(tensor.name))], None)


def _weight(name: str) -> str:
    """Returns the name of a tensor; of a low-rank factor that of the weight that it corrects."""
    return corrected_linear(name) if is_factor(name) else name
