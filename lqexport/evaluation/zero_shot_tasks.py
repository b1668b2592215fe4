"""Runs zero-shot tasks with EleutherAI's lm-evaluation-harness, on any model that lqexport reads."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lqexport.errors import UserError, check_least, files_at_hand, install
from lqexport.evaluation.whole_models import check_runnable, runnable
from lqexport.models.any_model import open_model
from lqexport.runtime.environment import choose_device
from lqexport.runtime.hub import hub

MISSING = f"Tasks need lm-evaluation-harness: {install('eval')}"
TASKS = (
    "arc_easy", "arc_challenge", "lambada_openai", "hellaswag", "piqa", "winogrande", "boolq", "openbookqa", "mmlu",
)  # fmt: skip
"""The tasks of the papers on quantization."""


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task. `error` is one standard error; None if the harness gives none."""

    task: str
    metric: str
    value: float
    error: float | None


def check_installed() -> None:
    """Raises UserError if the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(MISSING)


@files_at_hand()
def zero_shot(
    file: str | Path,
    tasks: Sequence[str] = TASKS,
    *,
    include: str | Path | None = None,
    shots: int = 0,
    limit: int | None = None,
    batch_size: int = 1,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
) -> list[TaskScore]:
    """Returns the scores of a model on tasks of the harness.

    file      a .gguf file, a folder that lqexport wrote, or a Hugging Face folder or hub id, quantized or not; the
              low-rank corrections of a written model are added
    tasks     names of tasks
    include   a folder with your own task files, in the harness's YAML
    shots     the number of worked examples before each question
    limit     the most questions of a task
    dtype     the dtype to run in; a native folder's linears stay packed, all others are decoded to it

    Raises UserError if the harness is missing, a task is unknown, its questions are out of reach, or the model cannot
    be read.
    """
    check_least(0, shots=shots)
    check_least(1, limit=limit, batch_size=batch_size)
    if not tasks:
        raise UserError("Name at least one task, such as arc_easy.")
    opened, chosen = open_model(file), choose_device(device)
    check_runnable(opened)
    manager = opened_tasks(tasks, include)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    tokenizer = opened.tokenizer()
    harness = HFLM(pretrained=runnable(opened, chosen, dtype), tokenizer=tokenizer, batch_size=batch_size)
    evaluation = simple_evaluate(
        model=harness, tasks=list(tasks), num_fewshot=shots, limit=limit, task_manager=manager, log_samples=False,
        bootstrap_iters=0,
    )  # fmt: skip
    return [score for task, results in evaluation["results"].items() for score in _scores(task, results)]


def opened_tasks(tasks: Sequence[str], include: str | Path | None) -> Any:
    """Returns the harness's task manager, after it has loaded all questions of the tasks, which may come from the hub.

    Raises UserError if the harness or the folder is missing, a task is unknown, or its questions cannot be loaded.
    """
    check_installed()
    if include is not None and not Path(include).is_dir():
        raise UserError(f"There is no folder {include}. Give --include the folder that has your task files.")
    manager = _manager(tasks, include)
    from lm_eval.tasks import get_task_dict

    try:
        with hub():
            manager.load(list(tasks)) if hasattr(manager, "load") else get_task_dict(list(tasks), manager)
    except Exception as error:  # whatever the hub's client raises: no network, no such data set, a full disk
        reason = " ".join(str(error).split("\n")[0].split()).rstrip(".")
        raise UserError(
            f"The questions of {', '.join(tasks)} cannot be loaded ({type(error).__name__}: {reason}). The harness's "
            "tasks take them from the hub: connect to it once, or give --include FOLDER for tasks of your own."
        ) from error
    return manager


def _manager(tasks: Sequence[str], include: str | Path | None) -> Any:
    """Returns the harness's task manager. Raises UserError if it does not know a task.

    The harness has thousands of task files of its own. They are only read if a task is not in the folder `include`.
    """
    from lm_eval.tasks import TaskManager

    unknown = list(tasks)
    for defaults in (False, True) if include else (True,):
        manager = TaskManager(include_path=str(include) if include else None, include_defaults=defaults)
        unknown = [task for task in tasks if not manager.match_tasks([task])]
        if not unknown:
            return manager
    raise UserError(f"The harness has no task {', '.join(unknown)}. Give --include FOLDER for tasks of your own.")


def _scores(task: str, results: dict[str, Any]) -> list[TaskScore]:
    """Returns a task's scores: the harness's `acc,none` and `acc_stderr,none` become one score."""
    scores = []
    for key, value in results.items():
        metric, _, filter_name = key.partition(",")
        if isinstance(value, float) and not metric.endswith("_stderr"):
            error = results.get(f"{metric}_stderr,{filter_name}")
            scores.append(TaskScore(task, metric, value, error if isinstance(error, float) else None))
    return scores
