"""Which tensor gets which codec, decided before anything is solved."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lqexport.formats.codec import nbytes
from lqexport.formats.registry import codec_named

PLAIN = "gguf:F16"
"""What folders of safetensors store embeddings, norms and biases in."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the model and the codec it will be stored with.

    name      Hugging Face name
    shape     as in the checkpoint
    codec_name    name in `formats.registry`
    linear    whether the solver works on it (a linear of a decoder block); other tensors are rounded
    wanted    the codec that was asked for, where a fallback replaced it
    reason    why, in a sentence
    source_grid   of a weight that the source holds quantized: `kept` where the codec holds its values as they are, so
                  that the solver need not work on it; else why it does not
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
        """[rows, columns]; a vector is one row."""
        rows, columns = self.shape if len(self.shape) == 2 else (1, self.shape[0])
        return rows, columns

    @property
    def weights(self) -> int:
        rows, columns = self.matrix
        return rows * columns

    @property
    def nbytes(self) -> int:
        return nbytes(codec_named(self.codec_name), *self.matrix)

    def as_json(self) -> dict[str, Any]:
        """All fields and the bytes, as JSON values for `--dry-run --json`."""
        fields = asdict(self)
        return {
            "name": fields.pop("name"),
            "shape": fields.pop("shape"),
            "codec": fields.pop("codec_name"),
            **fields,
        } | {"nbytes": self.nbytes}
