"""`--dry-run`: shows what a run would do and cost, before any work."""

from __future__ import annotations

import functools
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lqexport.converters.counting import copied_output, counted
from lqexport.converters.plan import PlannedTensor
from lqexport.errors import UserError, files_at_hand
from lqexport.models.column_order import source_of
from lqexport.models.inspect import TensorInfo, size, table
from lqexport.models.source import Source
from lqexport.models.source_grids import sentences
from lqexport.planning.calibration_text import calibration_at_hand, calibration_warnings
from lqexport.planning.compute_dtype import with_compute_dtype
from lqexport.planning.cost import Work
from lqexport.planning.defaults import by_effort, settled
from lqexport.planning.efforts import effort_sentence, seconds_by_effort
from lqexport.planning.memory import memory_estimate, placement_sentence
from lqexport.planning.needs import check_needs
from lqexport.planning.output_folder import check_output_folder, check_same_calibration
from lqexport.planning.rates import measured_rates
from lqexport.planning.recipe_plan import check_sequence_length, plan_factors, plan_recipe, size_limit, spared_bytes
from lqexport.recipe import Effort, Recipe
from lqexport.runtime.placement import Placement
from lqexport.runtime.shown import Shown
from lqexport.sizes import human_bytes
from lqexport.storage.artifact import Artifact


@dataclass(frozen=True, repr=False)
class Preview(Shown):
    """The plan of a run, shown before any work.

    recipe    the recipe with nothing left open
    out       the output folder
    config    the source's config.json
    tensors   every tensor that will be stored, with its codec
    already   bytes of tensors that the output folder holds from an earlier, stopped run
    free      bytes free on the output's disk
    spared    bytes that the types to be chosen for a size will take less than those in `tensors`
    warnings  what the written file will do otherwise than the source, as sentences
    efforts   the recipe as it would be at each effort
    """

    recipe: Recipe
    out: Path
    config: dict[str, Any]
    tensors: list[PlannedTensor]
    already: int
    free: int
    spared: int = 0
    warnings: tuple[str, ...] = ()
    efforts: dict[Effort, Recipe] = field(default_factory=dict)

    @property
    def entries(self) -> list[TensorInfo]:
        """The tensors, as `inspect` lists them."""
        return [TensorInfo(tensor.name, tensor.shape, tensor.codec_name, tensor.nbytes) for tensor in self.tensors]

    @property
    def work(self) -> Work:
        """The facts that the estimates are computed from."""
        return Work(self.recipe, self.config, self.tensors)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors; the most that they may take where types are chosen to fit a size."""
        return size(self.entries) - self.spared

    @property
    def bits_per_weight(self) -> float:
        """Bits of `tensor_bytes` per weight."""
        return 8 * self.tensor_bytes / counted(self.entries, copied_output(self.config)).weights

    @property
    def missing_bytes(self) -> int:
        """Bytes of tensors that the run has yet to write."""
        return self.tensor_bytes - self.already

    def check_disk(self) -> None:
        """Raises UserError if the artifact does not fit on the disk."""
        if self.missing_bytes > self.free:
            raise UserError(
                f"The artifact needs {human_bytes(self.missing_bytes)} more, and the disk has {human_bytes(self.free)} "
                "free. Free some space or choose another output folder."
            )


@files_at_hand()
def preview(recipe: Recipe, out: str | Path) -> Preview:
    """Returns what a run of `recipe` into the folder `out` would do; reads no weights.

    Raises UserError if the source cannot be read, if the target cannot hold the model, if the calibration text is too
    short or cannot be read, or as `check_output_folder` and `check_needs` do.
    """
    artifact, source = Artifact(Path(out)), source_of(recipe)
    efforts = by_effort(recipe, source.config)
    recipe = efforts[recipe.effort]
    check_output_folder(artifact, recipe, source)
    tensors = plan_recipe(source, recipe, artifact.chosen_types())
    check_sequence_length(recipe, source, tensors)
    limit = size_limit(source, recipe, tensors)
    calibration = calibration_at_hand(recipe, source, tensors)
    check_same_calibration(artifact, calibration)
    warnings = check_needs(source, recipe, tensors, limit) + calibration_warnings(recipe, source.config, calibration)
    return replace(_preview_of(source, recipe, tensors, limit, artifact), warnings=tuple(warnings), efforts=efforts)


def preview_of_finished(recipe: Recipe, out: Path) -> Preview:
    """Returns the preview of a run that has ended, with the types that it chose. What a run needs is not checked."""
    artifact, source = Artifact(out), source_of(recipe)
    recipe = settled(recipe, source.config)
    tensors = plan_recipe(source, recipe, artifact.chosen_types())
    return _preview_of(source, recipe, tensors, size_limit(source, recipe, tensors), artifact)


def _preview_of(
    source: Source, recipe: Recipe, tensors: list[PlannedTensor], limit: int | None, artifact: Artifact
) -> Preview:
    """Returns the preview of a plan. `limit` is what `size_limit` returns."""
    out, spared = artifact.folder, spared_bytes(tensors, limit)
    tensors = tensors + plan_factors(source, tensors, recipe)
    already = sum(tensor.nbytes for tensor in tensors if tensor.name in artifact)
    existing = next(folder for folder in [out, *out.absolute().parents] if folder.is_dir())
    return Preview(recipe, out, source.config, tensors, already, shutil.disk_usage(existing).free, spared)


def fallbacks(tensors: Iterable[PlannedTensor]) -> list[str]:
    """Returns one sentence for all tensors with the same fallback and reason."""
    counts = Counter((tensor.wanted, tensor.codec_name, tensor.reason) for tensor in tensors if tensor.reason)
    return [
        f"{count} tensors take {codec} instead of {wanted}: {reason}"
        for (wanted, codec, reason), count in counts.items()
    ]


def _seconds_on(shown: Preview, placement: Placement) -> dict[Effort, float]:
    """Returns the estimated seconds of the run at each effort on the placement's device, from measured rates."""
    rates_in = functools.partial(measured_rates, str(placement.device))
    return seconds_by_effort(shown.work, shown.efforts, placement, torch.get_num_threads(), rates_in)


def as_json(shown: Preview, placement: Placement) -> dict[str, Any]:
    """Returns all figures of a dry run as JSON values."""
    seconds = _seconds_on(shown, placement)
    return {
        "target": shown.recipe.target,
        "bits_per_weight": shown.bits_per_weight,
        "tensor_bytes": shown.tensor_bytes,
        "estimated_memory_bytes": memory_estimate(shown.work, placement),
        "memory_choices": {
            "moments": placement.moments.name,
            "factors": placement.cholesky.name,
            "rows": placement.rows,
            "parts": placement.parts,
            "held_tokens": min(shown.work.tokens, placement.held),
        },
        "estimated_seconds": seconds[shown.recipe.effort],
        "estimated_seconds_by_effort": seconds,
        "free_disk_bytes": shown.free,
        "already_written_bytes": shown.already,
        "fallbacks": fallbacks(shown.tensors),
        "warnings": list(shown.warnings),
        "tensors": [tensor.as_json() for tensor in shown.tensors],
    }


def show_plan(shown: Preview, console: Console, every: bool = False) -> None:
    """Prints the types of the tensors and the fallbacks; with `every` each tensor by itself."""
    console.print(table(shown.entries, copied_output(shown.config), every))
    if shown.recipe.size and not Artifact(shown.out).chosen_types():
        console.print(f"These types will be chosen anew, to fit {shown.recipe.size}.", markup=False, highlight=False)
    if shown.recipe.bits is not None and shown.recipe.method != "rtn":
        console.print("Widths: even here; the run measures what each choice costs and takes the best of this size.")
    for sentence in sentences(shown.tensors):
        console.print(sentence, markup=False, highlight=False)
    for sentence in fallbacks(shown.tensors):
        console.print(f"Fallback: {sentence}", markup=False, highlight=False)


def show_estimates(shown: Preview, console: Console, placement: Placement) -> None:
    """Prints what the run would cost, how much disk space is free, and the warnings."""
    seconds = _seconds_on(shown, placement)
    minutes = seconds[shown.recipe.effort] / 60
    most = "at most " if shown.spared else ""
    lines = (
        f"Tensor data: {most}{human_bytes(shown.tensor_bytes)}, {shown.bits_per_weight:.3f} bits per weight",
        f"Peak memory: about {human_bytes(memory_estimate(shown.work, placement))} (estimate)",
        placement_sentence(placement),
        f"Time on {placement.device}: about {minutes:.1f} minutes (estimate from a measured matrix product)",
        effort_sentence({effort: each / 60 for effort, each in seconds.items()}, "minutes"),
        *filter(None, [with_compute_dtype(shown.work, placement.device.type, None)[1]]),
        f"Disk: needs {human_bytes(shown.missing_bytes)}, has {human_bytes(shown.free)} free",
        *(f"Warning: {sentence}" for sentence in shown.warnings),
    )
    for line in lines:
        console.print(line, markup=False, highlight=False)
