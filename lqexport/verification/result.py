"""What a verification found, and what of it can be asked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lqexport.converters.factors import is_factor
from lqexport.evaluation.embeddings import Similarity
from lqexport.evaluation.evaluate import Evaluation
from lqexport.evaluation.figures import finite_or_null
from lqexport.verification.matrix_view import InContext, MatrixView

Engine = Literal["lqexport", "llama.cpp"]


@dataclass(frozen=True)
class TensorCheck:
    """One tensor as read from the file.

    weight_error   energy of (file - source) relative to that of the source's weights; None where the source lacks it
    output_error   energy of the output error relative to the output's, as the run recorded it on its calibration
                   tokens; None where no artifact is at hand. The one number here that is not computed from the file.
    finite         whether all decoded values are
    same_bytes     whether the digest is the artifact's; None where no artifact is at hand
    """

    name: str
    codec: str
    shape: tuple[int, ...]
    nbytes: int
    weight_error: float | None
    output_error: float | None
    finite: bool
    same_bytes: bool | None

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


@dataclass
class Verification:
    """What was found. `failed` holds one sentence per reason why the file does not pass; empty means that it does.

    adapter            the file of low-rank corrections, or the artifact folder that holds them; None without any
    activations        the type that inputs of linears were rounded to, emulated; None where they were not
    smoothed           norms and linears whose scales are others than the source's (`lqexport.models.smoothing`)
    evaluations        of the file, with its adapter where there is one: what the limits are on
    worst              the first evaluation's tokens of the largest KL divergence, with the text before them
    portrait           one linear's weights and grid
    base_evaluations   of the file without its adapter
    similarity         of an encoder's embeddings, in the place of evaluations
    """

    file: str
    sha256: str
    against: str
    source_fingerprint: str
    engine: str
    device: str
    text: str
    text_sha256: str
    versions: dict[str, str]
    adapter: str | None = None
    activations: str | None = None
    decoding: str = "NumPy"
    smoothed: int = 0
    limits: dict[str, float] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    tensors: list[TensorCheck] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    worst: list[InContext] = field(default_factory=list)
    matrix_view: MatrixView | None = None
    base_evaluations: list[Evaluation] = field(default_factory=list)
    similarity: Similarity | None = None
    warnings: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors' data."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Effective, over all tensors, scales, tables and factors included."""
        return 8 * self.nbytes / max(1, sum(tensor.weights for tensor in self.tensors if not is_factor(tensor.name)))

    @property
    def columns(self) -> Sequence[tuple[str, Evaluation | Similarity]]:
        """Every evaluation with its title."""
        if self.similarity:
            return [("embeddings", self.similarity)]
        base = [(f"{found.protocol}, base alone", found) for found in self.base_evaluations]
        return [(found.protocol, found) for found in self.evaluations] + base

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON values; what is not finite becomes null."""
        content = dataclasses.asdict(self) | {"nbytes": self.nbytes, "bits_per_weight": self.bits_per_weight}
        content["passed"] = not self.failed
        for name in ("evaluations", "base_evaluations"):
            for entry, evaluation in zip(content[name], getattr(self, name), strict=True):
                entry["perplexity_ratio"] = evaluation.perplexity_ratio
        return finite_or_null(content)
