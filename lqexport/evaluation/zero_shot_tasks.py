"""Zero-shot tasks through EleutherAI's lm-evaluation-harness, on any file or folder that this program reads."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lqexport.converters.models.architectures import architecture_of
from lqexport.errors import UserError
from lqexport.evaluation.evaluate import check_predicts
from lqexport.integration.loading import load
from lqexport.models.adapters import CorrectedModel, open_factors
from lqexport.models.interface import Weights
from lqexport.models.tokenizers import tokenizer_of
from lqexport.models.written import NativeFolder, open_export
from lqexport.runtime.environment import choose_device

MISSING = "Tasks need lm-evaluation-harness: pip install 'lqexport[eval]'"
TASKS = (
    "arc_easy", "arc_challenge", "lambada_openai", "hellaswag", "piqa", "winogrande", "boolq", "openbookqa", "mmlu",
)  # fmt: skip
"""Those of the papers."""


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task: `value` with one standard error, None where the harness gives none."""

    task: str
    metric: str
    value: float
    error: float | None


def check_installed() -> None:
    """Raises UserError where the harness is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(MISSING)


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
    """Scores of a written model (.gguf file, native or EXL2 folder, artifact, with its corrections).

    include   a folder of task files of your own, in the harness's YAML
    shots     worked examples before each question
    limit     at most so many questions a task
    dtype     to run in; a native folder's linears stay packed, all others are decoded into it

    Raises UserError where the harness is missing, a task is unknown or the model cannot be read.
    """
    check_installed()
    path = Path(file)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager = _manager(tasks, include)
    model = runnable(path, choose_device(device), dtype)
    harness = HFLM(pretrained=model, tokenizer=tokenizer_of(path), batch_size=batch_size)
    found = simple_evaluate(
        model=harness, tasks=list(tasks), num_fewshot=shots, limit=limit, task_manager=manager, log_samples=False,
        bootstrap_iters=0,
    )  # fmt: skip
    return [score for task, results in found["results"].items() for score in _scores(task, results)]


def _manager(tasks: Sequence[str], include: str | Path | None) -> Any:
    """The harness's list of tasks. Its own are thousands of files, read only where a task is not in `include`."""
    from lm_eval.tasks import TaskManager

    unknown = list(tasks)
    for defaults in (False, True) if include else (True,):
        manager = TaskManager(include_path=str(include) if include else None, include_defaults=defaults)
        unknown = [task for task in tasks if not manager.match_tasks([task])]
        if not unknown:
            return manager
    raise UserError(f"The harness has no task {', '.join(unknown)}. Give --include FOLDER for tasks of your own.")


def _scores(task: str, results: dict[str, Any]) -> list[TaskScore]:
    """`acc,none` and `acc_stderr,none` of the harness as one score."""
    scores = []
    for key, value in results.items():
        metric, _, kind = key.partition(",")
        if isinstance(value, float) and not metric.endswith("_stderr"):
            error = results.get(f"{metric}_stderr,{kind}")
            scores.append(TaskScore(task, metric, value, error if isinstance(error, float) else None))
    return scores


def runnable(path: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model of transformers with the file's weights: packed for a native folder, else decoded, corrections added.
    Raises UserError where the file cannot be read, and for an encoder."""
    export = open_export(path)
    check_predicts(architecture_of(export.config))
    if isinstance(export, NativeFolder):
        return load(path, dtype=dtype, device_map={"": device})
    factors = open_factors(path, None, export.config)
    return dense(CorrectedModel(export, factors) if factors else export, device, dtype)


def dense(weights: Weights, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model of transformers with `weights`, decoded. Raises UserError where it keeps a tensor in another form."""
    options = {key: value for key, value in weights.config.items() if key != "quantization_config"}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**options), dtype=dtype)
    names = set(weights.names())
    if strange := [name for name, _ in model.named_parameters() if name not in names]:
        raise UserError(f"transformers keeps {strange[0]} in another form than the file, so tasks cannot be run on it.")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.read(name))
    return model.eval()
