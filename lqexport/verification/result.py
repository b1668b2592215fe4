"""The result of a verification: its fields, and what is computed from them."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lqexport.evaluation.embeddings import Similarity
from lqexport.evaluation.evaluate import Evaluation
from lqexport.evaluation.figures import finite_or_null
from lqexport.sizes import human_bytes
from lqexport.storage.published import public_name, public_run, public_sentence
from lqexport.verification.long_record import LongWindow
from lqexport.verification.matrix_view import InContext, MatrixView
from lqexport.verification.talk_record import Talk

Engine = Literal["lqexport", "llama.cpp", "mlx"]


@dataclass(frozen=True)
class TensorCheck:
    """The checks of one tensor, as read from the file.

    codec          name of the codec that stores the tensor
    nbytes         bytes of its packed planes
    weight_error   sum of squares of (file - source), relative to that of the source's weights; None if the source has
                   no such tensor
    output_error   energy of the linear's output error relative to the energy of its output, as the run recorded it on
                   its calibration tokens; None without an artifact. The only number here that is not computed from
                   the file.
    finite         whether all decoded values are finite
    same_bytes     whether the digest of the planes is the artifact's; None without an artifact
    rounding_error  weight_error of the source's own weights, rounded to nearest in the codec; None if not measured
    deviation      how it differs from the source's as no quantizer leaves it, as the rest of a sentence; None if it
                   does not, or if that is not known
    """

    name: str
    codec: str
    shape: tuple[int, ...]
    nbytes: int
    weight_error: float | None
    output_error: float | None
    finite: bool
    same_bytes: bool | None
    rounding_error: float | None = None
    deviation: str | None = None

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Part:
    """A part of the model, run on the source's hidden states: the embedding, a decoder block, or norm and output layer.

    error      relative error of what the part adds to the hidden states; of the logits, for the output
    expected   the same of the source's own weights, rounded to the file's types
    tensors    names of its tensors
    """

    name: str
    error: float
    expected: float
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class ExpectedLoss:
    """A file's mean KL divergence on the first windows, and what its types should cost there, in nats.

    measured         of the file
    expected         of the source's own weights, rounded to nearest in the file's types
    floor            what is put down to the engine's arithmetic
    parts            the same for each part of the model by itself, on the first window
    kl_by_position   the file's KL divergence in bins of positions of the first window, by our own forward
    """

    protocol: str
    windows: int
    measured: float
    expected: float
    floor: float
    parts: list[Part] = field(default_factory=list)
    kl_by_position: list[float] = field(default_factory=list)


@dataclass(repr=False)
class Verification:
    """The result of a verification. The file passes if `failed` is empty.

    adapter            file of low-rank corrections, or the artifact folder that holds them; None without corrections
    license            what the source says of its license: license, license_name, license_link
    activations        type that the inputs of linears were rounded to (emulated); None if they were not rounded
    weights            number of the source's weights (`counted`); None before the tensors were read
    linears_bits_per_weight   the same of the decoder blocks' linears, without embedding and output, in bits per weight
    decoding           sentence that says by which path the tensors were decoded
    smoothed           number of norms and linears whose scales differ from the source's (`lqexport.models.smoothing`)
    limits             the limits that were checked
    run                content of the artifact's run.json; empty without an artifact
    evaluations        one for each protocol, of the file with its adapter if it has one; limits are checked on these
    worst              tokens of the largest KL divergence in the first evaluation, with the text before them
    portrait           one linear's weights and grid
    expected           what the file's types should cost, for each protocol; none where the file loses next to nothing
    causes             one sentence for each likely cause of a loss that is too large
    base_evaluations   one for each protocol, of the file without its adapter
    talk               how the file talks: chat template, stop tokens, continuations; None of an encoder
    long               losses by position in one long window; None if not asked for
    similarity         of an encoder's embeddings; an encoder has this instead of evaluations
    warnings           one sentence for each doubt that does not fail the file
    failed             one sentence for each reason why the file does not pass
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
    license: dict[str, str] = field(default_factory=dict)
    activations: str | None = None
    weights: int | None = None
    linears_bits_per_weight: float | None = None
    decoding: str = "NumPy"
    smoothed: int = 0
    limits: dict[str, float] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    tensors: list[TensorCheck] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    worst: list[InContext] = field(default_factory=list)
    portrait: MatrixView | None = None
    expected: list[ExpectedLoss] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)
    base_evaluations: list[Evaluation] = field(default_factory=list)
    talk: Talk | None = None
    long: LongWindow | None = None
    similarity: Similarity | None = None
    warnings: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def family(self) -> str:
        """The family of the format: gguf, native, mlx, gptq, exl2 or exl3. Plain tensors of folders count as GGUF's."""
        families = [tensor.codec.partition(":")[0].partition("-")[0] for tensor in self.tensors]  # gguf-norm is gguf
        return next((family for family in families if family != "gguf"), "gguf")

    @property
    def target(self) -> str:
        """The target that the run names, else the type of most bytes."""
        if target := self.run.get("recipe", {}).get("target"):
            return str(target)
        total: Counter[str] = Counter()
        for tensor in self.tensors:
            total[tensor.codec] += tensor.nbytes
        return total.most_common(1)[0][0] if total else "gguf"

    @property
    def nbytes(self) -> int:
        """Bytes of the data of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits of all tensors' data, with scales, tables and low-rank factors, per weight of the source."""
        return 8 * self.nbytes / max(1, self.weights or 0)

    @property
    def columns(self) -> Sequence[tuple[str, Evaluation | Similarity]]:
        """Returns (title, measurements) for every column of the table of measurements."""
        if self.similarity:
            return [("embeddings", self.similarity)]
        base = [(f"{evaluation.protocol}, base alone", evaluation) for evaluation in self.base_evaluations]
        return [(evaluation.protocol, evaluation) for evaluation in self.evaluations] + base

    def __repr__(self) -> str:
        loss = f", KL {self.evaluations[0].kl:.4g}" if self.evaluations else ""
        size = f"{human_bytes(self.nbytes)}, {self.bits_per_weight:.3f} bits per weight"
        verdict = f"{len(self.failed)} faults" if self.failed else "no fault"
        return f"<Verification of {self.file}: {verdict}, {size}{loss}>"

    def published(self) -> Verification:
        """Returns the result with public names in the place of this machine's paths, for card, page and record."""
        recipe, calibration = self.run.get("recipe", {}), self.run.get("calibration") or {}
        sources = [path for path in (self.against, recipe.get("source")) if path]
        files = [path for path in (self.file, self.adapter, self.text, calibration.get("name")) if path]
        names = {path: public_name(path) for path in sources} | {path: Path(path).name for path in files}
        warnings, failed, causes = (
            [public_sentence(sentence, names) for sentence in sentences]
            for sentences in (self.warnings, self.failed, self.causes)
        )
        return dataclasses.replace(
            self, run=public_run(self.run), file=names[self.file], against=names[self.against], text=names[self.text],
            adapter=names[self.adapter] if self.adapter else None, warnings=warnings, failed=failed, causes=causes,
            talk=self.talk.published(names) if self.talk else None,
        )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """Returns all fields as JSON values; numbers that are not finite become null."""
        content = dataclasses.asdict(self) | {"nbytes": self.nbytes, "bits_per_weight": self.bits_per_weight}
        content["passed"] = not self.failed
        for name in ("evaluations", "base_evaluations"):
            for entry, evaluation in zip(content[name], getattr(self, name), strict=True):
                entry["perplexity_ratio"] = evaluation.perplexity_ratio
        return finite_or_null(content)
