"""All files of a model that a publisher offers: each quantized, written and verified, with one card of all.

FOLDER/MODEL-Q4_K_M.gguf          a file of each type
FOLDER/MODEL-auto-4.25bpw.gguf    a file of each size, whose types are chosen
FOLDER/MODEL-Q4_K_M.gguf.record   its own card, report and verification.json
FOLDER/README.md                  the card of all files, with a table of their losses
FOLDER/ladder.svg                 the plot of KL divergence over bits per weight
FOLDER/ladder.json                the numbers of both

A finished file is not made again, so a stopped ladder goes on where it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lqexport.converters.models.architectures import architecture_of
from lqexport.delivery.deliver import deliver
from lqexport.delivery.ladder_card import Step, read_record, save_card, save_plot, step_of
from lqexport.delivery.places import Places
from lqexport.delivery.request import Measurement, Request
from lqexport.errors import UserError, files_at_hand
from lqexport.models.inspect import size
from lqexport.planning.dryrun import Preview, preview
from lqexport.planning.memory import MemoryLimits
from lqexport.recipe import Recipe
from lqexport.runtime.progress import Listener, Silent
from lqexport.runtime.shown import Shown
from lqexport.storage.files import check_space, claimed, write_json
from lqexport.storage.published import public_name, public_run, record_of
from lqexport.target import AUTO, Target, spelled
from lqexport.verification.default_limits import MAX_OVER_EXPECTED, MAX_PERPLEXITY_RATIO
from lqexport.verification.publish import CARD, LADDER, PLOT, upload_list
from lqexport.verification.result import Engine

TYPES = ("Q2_K_M", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
"""The types of a ladder by default."""


@dataclass(frozen=True)
class Rung:
    """One file of a ladder.

    request    its export
    preview    its plan
    finished   whether the folder holds it, verified, from an earlier call
    """

    request: Request
    preview: Preview
    finished: bool


@dataclass(repr=False)
class Ladder(Shown):
    """The files of a finished ladder.

    folder   where they are
    steps    one for each file that passed its verification, smallest first
    failed   the files that exceeded a limit
    seconds  file name -> how long it took in this call
    """

    folder: Path
    steps: list[Step]
    failed: list[Path] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether all files kept all limits."""
        return not self.failed

    def as_json(self) -> dict[str, Any]:
        """Returns all fields as JSON values."""
        return {
            "folder": str(self.folder), "passed": self.passed, "files": [asdict(step) for step in self.steps],
            "failed": [str(path) for path in self.failed], "seconds": self.seconds,
        }  # fmt: skip


def make_ladder(
    model: str | Recipe,
    folder: str | Path,
    types: Sequence[str] | None = None,
    *,
    sizes: Sequence[str] | None = None,
    text: str = "python-heldout",
    windows: int | None = None,
    engine: Engine | None = None,
    max_kl: float | None = None,
    max_perplexity_ratio: float | None = MAX_PERPLEXITY_RATIO,
    max_over_expected: float | None = MAX_OVER_EXPECTED,
    device: str = "auto",
    listener: Listener | None = None,
    limits: MemoryLimits | None = None,
) -> Ladder:
    """Makes a verified GGUF file of each type and size, and one comparison; or finishes what a stopped call began.

    model    a source, or a recipe for all files, whose target and size are not used
    folder   where the files are written. A finished file in it is not made again.
    types    GGUF types or mixes, such as Q4_K_M; by default `TYPES` unless there are sizes
    sizes    sizes as `Recipe.size` has them, such as 4.25bpw: a file for each, whose types are chosen to lose least

    The other arguments are those of `export_model`. Raises UserError for bad input, before any work where that is
    possible. A file that exceeds a limit is no error: see `Ladder.passed`.
    """
    recipe = model if isinstance(model, Recipe) else Recipe(model, f"gguf:{TYPES[0]}")
    measurement = Measurement(text, windows, engine, max_kl, max_perplexity_ratio, max_over_expected)
    rungs = planned_ladder(recipe, Path(folder), types, sizes, measurement, device=device, memory=limits)
    return finished_ladder(rungs, Path(folder), listener or Silent())


def planned_ladder(
    recipe: Recipe, folder: Path, types: Sequence[str] | None, sizes: Sequence[str] | None, measurement: Measurement,
    *, device: str = "auto", memory: MemoryLimits | None = None,
) -> list[Rung]:  # fmt: skip
    """Returns the files to make, after checking all that can be known before work; reads no weights.

    Raises UserError as `Request.check` does, for types and sizes that make no ladder, and for a file of the folder that
    is not the one that would be made.
    """
    if types is None:
        types = TYPES if sizes is None else ()
    requests = [
        Request(each, Places(folder / name), measurement, device, memory=memory)
        for name, each in _recipes(recipe, types, sizes or ()).items()
    ]
    rungs = [_rung(request) for request in requests]
    if architecture_of(rungs[0].preview.config).encoder:
        raise UserError("A ladder compares what models predict, and this one is an encoder: use `lqexport export`.")
    missing = [rung for rung in rungs if not rung.finished]
    if missing:
        bytes_of = [size(rung.preview.entries) for rung in missing]
        check_space(folder / LADDER, sum(bytes_of) + max(bytes_of))  # the artifact of one file at a time lies beside it
        missing[0].request.check_text()
    return [replace(rung, request=replace(rung.request, cache=_cache(rung, folder))) for rung in rungs]


def _recipes(recipe: Recipe, types: Sequence[str], sizes: Sequence[str]) -> dict[str, Recipe]:
    """Returns file name -> recipe, for every type and size. Raises UserError for what makes no ladder."""
    targets = [Target.parse(f"gguf:{spelled(name.strip()).removeprefix('gguf:')}") for name in types]
    if not targets and not sizes:
        raise UserError(f"Name at least one type, such as {','.join(TYPES)}, or one size, such as 4.25bpw.")
    if AUTO in targets:
        raise UserError(f"{AUTO} needs a size: name it among the sizes (--sizes), and leave {AUTO} out.")
    # What a choice of types leaves out says nothing of a type that is named.
    without = None if sizes else recipe.without
    recipes = [replace(recipe, target=str(target), size=None, without=without) for target in targets]
    recipes += [replace(recipe, target=str(AUTO), size=size.strip()) for size in sizes]
    model = public_name(recipe.source).rpartition("/")[2].removesuffix(".gguf")
    names = {f"{model}-{_label(each)}.gguf": each for each in recipes}
    if len(names) < len(recipes):
        raise UserError(f"A type or size is named twice in {','.join((*types, *sizes))}. Name each once.")
    return names


def _label(recipe: Recipe) -> str:
    """Returns what the name of a file says of its types."""
    return recipe.parsed_target.type if recipe.size is None else f"{AUTO.type}-{recipe.size}"


def _rung(request: Request) -> Rung:
    """Returns a file of the ladder with its plan."""
    places = request.places
    if not places.model.exists():
        return Rung(request, request.check(), finished=False)
    shown = preview(request.recipe, places.artifact)
    _check_finished(request, shown)
    return Rung(request, shown, finished=True)


def _check_finished(request: Request, shown: Preview) -> None:
    """Raises UserError if the file that has the request's name is not what the request would make."""
    path, remedy = request.places.model, "Delete it, or choose another folder."
    if not request.places.record.exists():
        raise UserError(f"{path} exists without its record. {remedy}")
    upload_list(path, record=request.places.record)
    result = read_record(request.places.record)
    recipe = public_run({"recipe": asdict(shown.recipe)})["recipe"]
    if shown.recipe.compute_dtype is None:
        del recipe["compute_dtype"]  # the machine that made the file chose it
    made_by = result.get("run", {}).get("recipe", {})
    if different := [name for name in recipe if made_by.get(name) != recipe[name]]:
        raise UserError(f"{path} was made with another {different[0].replace('_', ' ')}. {remedy}")
    text = Path(request.measurement.text).name
    if (result.get("text"), result.get("engine")) != (text, request.engine):
        raise UserError(f"{path} was measured on {result.get('text')} in {result.get('engine')}. {remedy}")


def _cache(rung: Rung, folder: Path) -> Path | None:
    """Returns the folder of the second moments and predicted losses that files share; None if they share none.

    With the quantized prefix each file is solved under its own second moments; only a choice of types by size has those
    of the full-precision model. The second moments of experts would have to be kept all at once.
    """
    recipe = rung.preview.recipe
    shared = recipe.prefix == "full" or recipe.size is not None
    return folder / ".ladder" if shared and not architecture_of(rung.preview.config).experts else None


@files_at_hand()
def finished_ladder(rungs: Sequence[Rung], folder: Path, listener: Listener) -> Ladder:
    """Makes the files of a planned ladder that are not there yet, and then comparison, plot and card.

    Raises UserError as `deliver` does, and if another process makes a ladder in the folder: they would share the second
    moments that the first one deletes at its end. A file that exceeds a limit is no error: see `Ladder.failed`.
    """
    with claimed(folder):
        made = _made(rungs, folder, listener)
        made.steps.sort(key=lambda step: step.nbytes)
        shutil.rmtree(folder / ".ladder", ignore_errors=True)
        if made.steps:
            plot = save_plot(made.steps, folder / PLOT)
            save_card(record_of(folder / made.steps[0].file), made.steps, folder / CARD, plot=plot)
            write_json(folder / LADDER, {"files": [asdict(step) for step in made.steps]})
    return made


def _made(rungs: Sequence[Rung], folder: Path, listener: Listener) -> Ladder:
    """Makes the files that are not there yet, and returns all of them."""
    made = Ladder(folder, [])
    for number, rung in enumerate(rungs, 1):
        places = rung.request.places
        if not rung.finished:
            listener.message(f"File {number} of {len(rungs)}: {places.model.name}")
            delivery = deliver(rung.request, listener)
            made.seconds[places.model.name] = sum(delivery.seconds.values())
            if not delivery.passed:
                made.failed.append(delivery.path)
                continue
        made.steps.append(step_of(places.record))
    return made
