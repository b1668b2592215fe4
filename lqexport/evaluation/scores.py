"""The results of `lqexport eval`: perplexities and task scores of one model, or of two, as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from lqexport.errors import UserError, files_at_hand
from lqexport.evaluation import zero_shot_tasks
from lqexport.evaluation.figures import finite_or_null, with_error
from lqexport.evaluation.papers import Cut, Perplexity, check_cutting, cut_texts, perplexity_on
from lqexport.evaluation.whole_models import check_runnable
from lqexport.models.any_model import AnyModel, open_model
from lqexport.runtime.environment import PACKAGES, choose_device, versions
from lqexport.runtime.progress import Listener, Silent


@dataclass(frozen=True)
class Scores:
    """The perplexities and task scores of one model, with the versions of the packages that computed them.

    file      the model: a written file, or a source
    against   another model, on the same windows and tasks; None if there was none
    source_perplexities, source_tasks   those of the other model; empty if there was none
    """

    file: str
    device: str
    perplexities: list[Perplexity]
    tasks: list[zero_shot_tasks.TaskScore]
    versions: dict[str, str]
    against: str | None = None
    source_perplexities: list[Perplexity] = field(default_factory=list)
    source_tasks: list[zero_shot_tasks.TaskScore] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Returns everything as JSON values; NaN and infinity become null."""
        return finite_or_null(asdict(self))


def task_names(given: str | None) -> list[str]:
    """Returns a comma-separated list of task names as a list; `papers` stands for the tasks of the papers."""
    names = [name.strip() for name in (given or "").split(",") if name.strip()]
    return [task for name in names for task in (zero_shot_tasks.TASKS if name == "papers" else (name,))]


@files_at_hand()
def evaluate(
    file: str | Path,
    texts: Sequence[str],
    tasks: Sequence[str],
    *,
    against: str | Path | None = None,
    include: Path | None = None,
    shots: int = 0,
    limit: int | None = None,
    protocol: str = "hf-2048",
    windows: int | None = None,
    device: str = "auto",
    listener: Listener | None = None,
) -> Scores:
    """Returns the results of `papers.perplexity` on the texts and of `zero_shot_tasks.zero_shot` on the tasks.

    against   a model, such as the file's source, that is measured on the same; None for none

    Raises UserError as they do, and if the two models split a text into other tokens.
    """
    check_cutting(protocol, windows)
    chosen, listener = choose_device(device), listener or Silent()
    models = [open_model(name) for name in (file, against) if name is not None]
    if tasks:  # they come last, and what they lack is said first
        for model in models:
            check_runnable(model)
        zero_shot_tasks.opened_tasks(tasks, include)
    cuts = _cut_alike(models, texts, protocol, windows, listener) if texts else []
    perplexities = [perplexity_on(cuts, model, chosen, listener) if cuts else [] for model in models]
    harness: dict[str, Any] = {"include": include, "shots": shots, "limit": limit, "device": device}
    scored = [zero_shot_tasks.zero_shot(model.name, tasks, **harness) if tasks else [] for model in models]
    used = versions(*PACKAGES, *(["lm_eval"] if tasks else []))
    result = Scores(str(file), str(chosen), perplexities[0], scored[0], used)
    if against is None:
        return result
    return replace(result, against=str(against), source_perplexities=perplexities[1], source_tasks=scored[1])


def _cut_alike(
    models: Sequence[AnyModel], texts: Sequence[str], protocol: str, windows: int | None, listener: Listener
) -> list[Cut]:
    """Returns the texts as all models run on them. Raises UserError if their tokenizers split one otherwise."""
    first, *others = models
    cuts = cut_texts(first, texts, protocol, windows, listener)
    for model in others:
        for ours, theirs in zip(cuts, cut_texts(model, texts, protocol, windows, Silent()), strict=True):
            if not np.array_equal(ours.windows, theirs.windows):
                raise UserError(
                    f"{first.name} and {model.name} split {ours.text} into other tokens, so their perplexities do not "
                    "compare. Give the model that the file was made from."
                )
    return cuts


class _Row(NamedTuple):
    """A line of the table: what was measured on which text or task, with one standard error."""

    on: str
    measure: str
    value: float
    error: float


def _rows(perplexities: Sequence[Perplexity], tasks: Sequence[zero_shot_tasks.TaskScore]) -> list[_Row]:
    rows = [
        _Row(each.text, f"perplexity, {each.protocol}, {each.windows} windows", each.perplexity, each.error)
        for each in perplexities
    ]
    for score in tasks:
        rows.append(_Row(score.task, score.metric, score.value, math.nan if score.error is None else score.error))
    return rows


def table(scores: Scores) -> Table:
    """Returns the table that `lqexport eval` prints: with another model, both values and file minus source."""
    result = Table(box=None, pad_edge=False)
    values = ("value",) if scores.against is None else ("file", "source", "difference")
    for title in ("on", "measure", *values):
        result.add_column(title, justify="right" if title in values else "left")
    rows, source_rows = _rows(scores.perplexities, scores.tasks), _rows(scores.source_perplexities, scores.source_tasks)
    for row, source in zip_longest(rows, source_rows):
        beside = [with_error(source.value, source.error), f"{row.value - source.value:+.4f}"] if source else []
        result.add_row(row.on, row.measure, with_error(row.value, row.error), *beside)
    return result
