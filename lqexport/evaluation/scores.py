"""The results of `lqexport eval`: perplexities and task scores of one file, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from lqexport.evaluation import zero_shot_tasks
from lqexport.evaluation.figures import finite_or_null, with_error
from lqexport.evaluation.papers import Perplexity, perplexity
from lqexport.runtime.environment import PACKAGES, choose_device, versions
from lqexport.runtime.progress import Listener


@dataclass(frozen=True)
class Scores:
    """The perplexities and task scores of one file, with the versions of the packages that computed them."""

    file: str
    device: str
    perplexities: list[Perplexity]
    tasks: list[zero_shot_tasks.TaskScore]
    versions: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """Returns everything as JSON values; NaN and infinity become null."""
        return finite_or_null(asdict(self))


def task_names(given: str | None) -> list[str]:
    """Returns a comma-separated list of task names as a list; `papers` stands for the tasks of the papers."""
    names = [name.strip() for name in (given or "").split(",") if name.strip()]
    return [task for name in names for task in (zero_shot_tasks.TASKS if name == "papers" else (name,))]


def evaluate(
    file: Path,
    texts: Sequence[str],
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    shots: int = 0,
    limit: int | None = None,
    protocol: str = "hf-2048",
    windows: int | None = None,
    device: str = "auto",
    listener: Listener | None = None,
) -> Scores:
    """Returns the results of `papers.perplexity` on the texts and of `zero_shot_tasks.zero_shot` on the tasks.

    Raises UserError as they do.
    """
    if tasks and texts:  # the tasks come last, and what they lack is said first
        zero_shot_tasks.opened_tasks(tasks, include)
    options: dict[str, Any] = {"protocol": protocol, "windows": windows, "device": device, "listener": listener}
    perplexities = perplexity(file, texts, **options) if texts else []
    scored = (
        zero_shot_tasks.zero_shot(file, tasks, include=include, shots=shots, limit=limit, device=device)
        if tasks
        else []
    )
    packages = (*PACKAGES, *(["lm_eval"] if tasks else []))
    return Scores(str(file), str(choose_device(device)), perplexities, scored, versions(*packages))


def table(scores: Scores) -> Table:
    """Returns the table that `lqexport eval` prints."""
    result = Table(box=None, pad_edge=False)
    for title in ("on", "measure", "value"):
        result.add_column(title, justify="right" if title == "value" else "left")
    for each in scores.perplexities:
        measure = f"perplexity, {each.protocol}, {each.windows} windows"
        result.add_row(each.text, measure, with_error(each.perplexity, each.error))
    for score in scores.tasks:
        error = float("nan") if score.error is None else score.error
        result.add_row(score.task, score.metric, with_error(score.value, error))
    return result
