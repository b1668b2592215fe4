"""Shows the numbers of a ladder's files, which their records have, as a table, a plot and one model card."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from lqexport.errors import well_formed
from lqexport.evaluation.figures import share, with_error
from lqexport.sizes import human_bytes
from lqexport.storage.files import read_json, written_whole
from lqexport.verification.card import front_matter, markdown_table
from lqexport.verification.comparison import Point, save_points
from lqexport.verification.publish import PLOT, REMEDY, RESULT
from lqexport.verification.usage import INSTALL, card_lines


@dataclass(frozen=True)
class Step:
    """The measurements of one verified file, from its record. Losses are in nats, `_error` is one standard error.

    top1   the share of tokens for which the file and the source rank the same token first
    """

    file: str
    target: str
    nbytes: int
    bits_per_weight: float
    kl: float
    kl_error: float
    perplexity: float
    perplexity_error: float
    top1: float

    @property
    def cells(self) -> list[str]:
        """The file's row of a table, below `TITLES`."""
        return [
            self.target.rpartition(":")[2], human_bytes(self.nbytes), f"{self.bits_per_weight:.3f}",
            with_error(self.kl, self.kl_error, 5), with_error(self.perplexity, self.perplexity_error, 3),
            share(self.top1),
        ]  # fmt: skip


TITLES = ("type", "size", "bits per weight", "KL divergence", "perplexity", "same top token")


def read_record(record: Path) -> dict[str, Any]:
    """Returns the numbers of a verification from its record. Raises UserError if they cannot be read."""
    content: dict[str, Any] = read_json(record / RESULT, f"{record} has no {RESULT}. {REMEDY}")
    return content


def step_of(record: Path) -> Step:
    """Returns the measurements of a file that predicts tokens. Raises UserError if its record is no such record."""
    result = read_record(record)
    with well_formed(record / RESULT, REMEDY):
        measured = result["evaluations"][0]
        return Step(
            result["file"], result["run"]["recipe"]["target"], result["nbytes"], result["bits_per_weight"],
            *(measured[name] for name in ("kl", "kl_error", "perplexity", "perplexity_error", "top1")),
        )  # fmt: skip


def table(steps: Sequence[Step]) -> Table:
    """Returns the table that `lqexport ladder` prints."""
    result = Table(box=None, pad_edge=False)
    result.add_column("file", overflow="fold")
    for title in TITLES:
        result.add_column(title, justify="right", no_wrap=True)
    for step in steps:
        result.add_row(step.file, *step.cells)
    return result


def save_plot(steps: Sequence[Step], path: Path) -> bool:
    """Writes the plot of KL divergence over bits per weight; returns whether matplotlib is there to draw it."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    points = [
        Point(f"{step.target.rpartition(':')[2]}, {human_bytes(step.nbytes)}", step.bits_per_weight, step.kl,
              step.kl_error)
        for step in steps
    ]  # fmt: skip
    save_points(points, path)
    return True


def save_card(record: Path, steps: Sequence[Step], path: Path, *, plot: bool) -> None:
    """Writes the model card of all files.

    record   of one of the files: what it says of source, license and text holds for all
    plot     whether the plot is there to be shown

    Raises UserError if the record or the card's folder cannot be used.
    """
    result = read_record(record)
    with well_formed(record / RESULT, REMEDY):
        content = _card(result, steps, plot)
    with written_whole(path) as file:
        file.write(content.encode())


def _card(result: dict[str, Any], steps: Sequence[Step], plot: bool) -> str:
    against = result["against"]
    model = against.rpartition("/")[2].removesuffix(".gguf")
    rows = [[f"`{step.file}`", *step.cells] for step in steps]
    windows = result["evaluations"][0]["windows"]
    measured = (
        f"Each file was opened again and compared with the source: on {windows} windows of the text "
        f"{result['text']}, in {result['engine']}. ± is one standard error. The folder `FILE.record` has the checks, "
        "the recipe and all numbers of a file."
    )
    lines = [
        *front_matter(against, result["license"], "gguf", "text-generation"), "", f"# {model}, GGUF", "",
        f"{against}, quantized with [lqexport]({INSTALL}).", "", *markdown_table(["file", *TITLES], rows), "", measured,
        "", *([f"![KL divergence over bits per weight]({PLOT})", ""] if plot else []), "## Use", "",
        *card_lines(steps[len(steps) // 2].file, "gguf"), "",
    ]  # fmt: skip
    return "\n".join(lines)
