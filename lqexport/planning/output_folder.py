"""Checks the output folder of a run before any work: it is new, empty, or holds the same run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lqexport.calibration.sequences import Calibration
from lqexport.errors import UserError
from lqexport.models.source import Source
from lqexport.recipe import Recipe
from lqexport.runtime.environment import versions
from lqexport.storage.artifact import Artifact
from lqexport.storage.files import check_writable


def identity_of(recipe: Recipe, source: Source) -> dict[str, Any]:
    """Returns the versions, the recipe and the fingerprint of the source, as JSON values of run.json."""
    return {
        "versions": versions("lqexport", "torch", "transformers", "numpy", "numba"),
        "recipe": asdict(recipe),
        "source_fingerprint": source.fingerprint,
    }


def check_output_folder(artifact: Artifact, recipe: Recipe, source: Source) -> None:
    """Raises UserError if an output folder holds another run or anything but an artifact, is the source's folder, or
    cannot be made.

    recipe   as the run will have it. A dtype that it leaves open will be that of the run in the folder

    The calibration (`check_same_calibration`) and the device, which a run compares too, are not looked at.
    """
    _check_apart(Path(recipe.source), artifact.folder)
    artifact.check_own()
    check_writable(artifact.folder)
    if not artifact.begun:
        return
    identity = identity_of(recipe, source)
    if recipe.compute_dtype is None:
        del identity["recipe"]["compute_dtype"]
    artifact.check_same(identity)


def check_same_calibration(artifact: Artifact, calibration: Calibration | None) -> None:
    """Raises UserError if an output folder holds a run with other calibration sequences. None are not compared."""
    if artifact.begun and calibration is not None:
        artifact.check_same({"calibration": calibration.facts()})


def _check_apart(source: Path, out: Path) -> None:
    """Raises UserError if the output folder is the source's folder; one within it is fine. A hub id is no folder."""
    if source.is_dir() and out.resolve() == source.resolve():
        raise UserError(f"The output folder {out} is the source {source}. Choose another one.")
