"""The plan of a run: which tensor gets which codec, decided before anything is solved."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from lqexport.errors import UserError, listed
from lqexport.formats.codec import nbytes
from lqexport.formats.registry import codec_named
from lqexport.target import Target

PLAIN = "gguf:F16"
"""The codec in which folders of safetensors store embeddings, norms and biases."""
UNQUANTIZED = 16
"""The value of `head_bits` for an output in float16."""

Shapes = dict[str, tuple[int, ...]]
"""Name -> shape of tensors."""


def rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns the rows and columns of a tensor of one or two dimensions; a vector is one row."""
    rows, columns = shape if len(shape) == 2 else (1, shape[0])
    return rows, columns


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the model and the codec in which it will be stored.

    name          Hugging Face name
    shape         shape in the checkpoint
    codec_name    name of the codec in `formats.registry`
    linear        whether the solver works on it (a linear of a decoder block); other tensors are rounded
    wanted        name of the codec that was asked for, if a fallback replaced it
    reason        the reason for the fallback
    source_grid   only for a weight that the source holds quantized: `kept` if the codec holds the source's values
                  exactly, so that the solver need not work on it; else the reason why it does not
    """

    name: str
    shape: tuple[int, ...]
    codec_name: str
    linear: bool
    wanted: str | None = None
    reason: str | None = None
    source_grid: str | None = None

    @property
    def matrix(self) -> tuple[int, int]:
        """The tensor's (rows, columns); a vector is one row."""
        return rows_and_columns(self.shape)

    @property
    def weights(self) -> int:
        """The number of weights."""
        rows, columns = self.matrix
        return rows * columns

    @property
    def nbytes(self) -> int:
        """The number of bytes that the packed tensor takes."""
        return nbytes(codec_named(self.codec_name), *self.matrix)

    def as_json(self) -> dict[str, Any]:
        """Returns all fields and the number of bytes, as JSON values for `--dry-run --json`."""
        fields = asdict(self)
        return {
            "name": fields.pop("name"),
            "shape": fields.pop("shape"),
            "codec": fields.pop("codec_name"),
            **fields,
        } | {"nbytes": self.nbytes}


def check_names(patterns: Iterable[str], shapes: Shapes) -> None:
    """Raises UserError if a shell pattern fits no matrix of a model."""
    for pattern in patterns:
        if not any(matches(pattern, name, shape) for name, shape in shapes.items()):
            raise UserError(f"No matrix of the model has a name like {pattern}; `lqexport inspect` lists the names.")


def matches(pattern: str, name: str, shape: tuple[int, ...]) -> bool:
    """Returns whether a tensor is a matrix whose name matches a shell pattern."""
    return len(shape) == 2 and fnmatchcase(name, pattern)


def refuse_fallbacks(target: Target, planned: list[PlannedTensor]) -> None:
    """Raises UserError, naming them, if some tensors would fall back to another type."""
    fallen = [f"{tensor.name} ({tensor.reason}, would be {tensor.codec_name})" for tensor in planned if tensor.reason]
    if fallen:
        raise UserError(
            f"{target} cannot hold {len(fallen)} of {len(planned)} tensors: {listed(fallen)}. Let them fall back, or "
            "choose another target."
        )
