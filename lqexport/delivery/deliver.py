"""The whole way from a model to a verified file: quantize, write, verify, report, and only then the final name."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lqexport.converters.factors import is_factor
from lqexport.delivery.places import Places, target_of
from lqexport.delivery.request import Measurement, Request
from lqexport.errors import files_at_hand
from lqexport.exporting import export
from lqexport.pipeline.quantize import quantize
from lqexport.planning.dryrun import Preview
from lqexport.planning.memory import MemoryLimits
from lqexport.recipe import Recipe
from lqexport.runtime.progress import Listener, Silent
from lqexport.runtime.shown import Shown
from lqexport.storage.artifact import Artifact
from lqexport.storage.files import claimed
from lqexport.verification.default_limits import MAX_OVER_EXPECTED, MAX_PERPLEXITY_RATIO
from lqexport.verification.publish import save_record
from lqexport.verification.result import Engine, Verification
from lqexport.verification.verifying import verify


@dataclass(repr=False)
class Delivery(Shown):
    """The files and figures of a finished export.

    path           the file or folder; its name says `failed` if the verification failed
    record         the folder of its card, report page and verification.json
    adapter        the file or folder of its low-rank corrections; None without any
    artifact       the artifact that it was made from; None once that is removed
    target         the target
    verification   how far the file is from its source
    report         what `quantize` returned
    seconds        step -> its duration: quantize, write, verify
    """

    path: Path
    record: Path
    adapter: Path | None
    artifact: Path | None
    target: str
    verification: Verification
    report: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the file kept all limits."""
        return not self.verification.failed

    def as_json(self) -> dict[str, Any]:
        """Returns the paths, the times and the verification as JSON values."""
        paths = {name: getattr(self, name) for name in ("path", "record", "adapter", "artifact")}
        return {name: str(path) if path else None for name, path in paths.items()} | {
            "target": self.target,
            "passed": self.passed,
            "seconds": self.seconds,
            "verification": self.verification.as_json(),
        }


def export_model(
    model: str | Recipe,
    path: str | Path,
    *,
    text: str = "python-heldout",
    windows: int | None = None,
    engine: Engine | None = None,
    max_kl: float | None = None,
    max_perplexity_ratio: float | None = MAX_PERPLEXITY_RATIO,
    max_over_expected: float | None = MAX_OVER_EXPECTED,
    min_cosine: float | None = None,
    device: str = "auto",
    cache: str | Path | None = None,
    keep_artifact: bool = False,
    listener: Listener | None = None,
    limits: MemoryLimits | None = None,
) -> Delivery:
    """Quantizes a model, writes it as a verified file, and returns what was written; or finishes what a stopped call
    began.

    model    a source, for a target that the file's name says (model-Q4_K_M.gguf), or a recipe
    path     the file or folder to write. It gets this name only if its verification passes. docs/export.md has the
             names of what stands beside it.
    text, windows, engine, max_kl, max_perplexity_ratio, max_over_expected, min_cosine
             how the file is verified, as in `verify`. The engine None is llama.cpp where it is installed and runs the
             target.
    device, cache, limits   as in `quantize`
    keep_artifact   keep the artifact, so that other files can be written of it
    listener        is told of the progress

    Raises UserError for bad input, before any work where that is possible. A file that exceeds a limit is no error:
    see `Delivery.passed`.
    """
    path = Path(path)
    request = Request(
        model if isinstance(model, Recipe) else Recipe(model, target_of(path)),
        Places(path),
        Measurement(text, windows, engine, max_kl, max_perplexity_ratio, max_over_expected, min_cosine),
        device=device, cache=Path(cache) if cache else None, memory=limits, keep_artifact=keep_artifact,
    )  # fmt: skip
    return deliver(request, listener or Silent())


@files_at_hand()
def deliver(request: Request, listener: Listener, on_plan: Callable[[Preview], None] | None = None) -> Delivery:
    """Runs all steps of an export after checking what can be known before.

    on_plan   called with the plan before the work

    Raises UserError as `export_model` does.
    """
    places, seconds = request.places, dict[str, float]()
    shown = request.check()
    request.check_room(shown)
    listener.stage(f"Read the evaluation text {request.measurement.text}", 0)
    request.check_text()
    if on_plan:
        on_plan(shown)
    with claimed(places.work):
        places.check_free()  # another export to this name may have ended since `check`
        with _timed(seconds, "quantize"):
            report = quantize(
                request.recipe, places.artifact, device=request.device, cache=request.cache, listener=listener,
                limits=request.memory,
            )  # fmt: skip
        unverified = places.within_work(places)
        with _timed(seconds, "write"):
            adapter = _write(request, unverified, listener)
        with _timed(seconds, "verify"):
            result = _verify(request, unverified, adapter, listener)
        return _named(request, result, report, seconds, listener)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    """Stores how long the context took as `seconds[step]`."""
    began = time.monotonic()
    yield
    seconds[step] = time.monotonic() - began


def _write(request: Request, to: Places, listener: Listener) -> Path | None:
    """Writes the artifact as file or folder, and its low-rank corrections, where a native folder does not hold them.

    Returns the path of the corrections, if any were written.
    """
    artifact, family = request.places.artifact, request.recipe.parsed_target.family
    to.remove()
    separate = family != "native" and any(is_factor(name) for name in Artifact(artifact).manifest())
    if family == "gguf":
        export(artifact, to.model, adapter=to.adapter if separate else None, listener=listener)
    else:
        export(artifact, to.model, listener=listener)
        if separate:
            export(artifact, to.adapter, format="peft", listener=listener)
    return to.adapter if separate else None


def _verify(request: Request, unverified: Places, adapter: Path | None, listener: Listener) -> Verification:
    """Verifies the written file. It fails, too, if the source is no longer the one that was quantized."""
    measurement = request.measurement
    result = verify(
        unverified.model, request.recipe.source, text=measurement.text, windows=measurement.windows,
        engine=request.engine, artifact=request.places.artifact, adapter=adapter, max_kl=measurement.max_kl,
        max_perplexity_ratio=measurement.max_perplexity_ratio, max_over_expected=measurement.max_over_expected,
        min_cosine=measurement.min_cosine, device=request.device, listener=listener,
    )  # fmt: skip
    if result.run.get("source_fingerprint") != result.source_fingerprint:
        result.failed.append(
            f"{result.against} has changed since it was quantized. Delete the files, and export again."
        )
    return result


def _named(
    request: Request, result: Verification, report: dict[str, Any], seconds: dict[str, float], listener: Listener
) -> Delivery:
    """Writes the record, and gives everything the final names: those of a failed file if the verification failed.

    The artifact of a failed file stays, so that the same command with other limits need not quantize again.
    """
    listener.stage("Write the record", 0)
    places = request.places
    final = places.failed if result.failed else places
    ready = places.within_work(final)
    places.within_work(places).move_to(ready)
    _set_paths(result, ready)
    save_record(result, ready.record)
    places.failed.remove()
    ready.move_to(final)
    _set_paths(result, final)
    kept = request.keep_artifact or bool(result.failed)
    if not kept:
        shutil.rmtree(places.work, ignore_errors=True)
    return Delivery(
        final.model, final.record, final.adapter if final.adapter.exists() else None, places.artifact if kept else None,
        str(request.recipe.parsed_target), result, report, seconds,
    )  # fmt: skip


def _set_paths(result: Verification, places: Places) -> None:
    """Has a result name the file, and the adapter if it has one, where they are now."""
    result.file = str(places.model)
    if result.adapter and places.adapter.exists():
        result.adapter = str(places.adapter)
