"""The commands eval and judge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lqexport.cli.common import plain_endings, print_result
from lqexport.cli.shared_options import AnyModel, Device, Json
from lqexport.errors import UserError
from lqexport.models.model_path import check_source_name
from lqexport.runtime.progress import terminal_listener


def evaluate(
    file: AnyModel,
    against: Annotated[
        str | None, typer.Option(help="Its source, to measure beside it on the same: a folder, hub id or .gguf file.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Perplexity on wikitext2, c4, c4-new, ptb or ptb-new, as in the papers, or a text as in verify. "
            "May repeat."
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness, with commas between; papers: those of the papers."),
    ] = None,
    include: Annotated[Path | None, typer.Option(help="Folder of task files of your own.")] = None,
    shots: Annotated[int, typer.Option(min=0, help="Worked examples before each question of a task.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many questions of a task.")] = None,
    protocol: Annotated[
        str, typer.Option(help="Of texts that are not the papers': hf-2048, llama.cpp-512.")
    ] = "hf-2048",
    windows: Annotated[
        int | None, typer.Option(min=1, help="Largest number of windows of each text. [default: the whole text]")
    ] = None,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """Perplexity and zero-shot tasks of a model, by this program's own decoding.

    FILE is a written file, or a source, quantized or not.

    Examples:

        lqexport eval ./model --text wikitext2 --text c4
        lqexport eval model.gguf --against ./model --text wikitext2
        lqexport eval ./model-3bit --tasks arc_easy,piqa --limit 200
    """
    with plain_endings():
        for name in filter(None, (file, against)):
            check_source_name(name)
        from lqexport.evaluation import scores

        names = scores.task_names(tasks)
        if not text and not names:
            raise UserError("Say what to evaluate: --text wikitext2, or --tasks arc_easy,piqa.")
        with terminal_listener() as listener:
            result = scores.evaluate(
                file, text or [], names, against=against, include=include, shots=shots, limit=limit,
                protocol=protocol, windows=windows, device=device, listener=listener,
            )  # fmt: skip
        print_result(result, scores.table, as_json=as_json)


def judge(
    file: AnyModel,
    endpoint: Annotated[str, typer.Option(help="An OpenAI-compatible API, such as http://localhost:8000/v1.")],
    model: Annotated[str, typer.Option(help="What the endpoint calls the model that judges.")],
    against: Annotated[
        str | None, typer.Option(help="The source, to compare answers with: a folder, hub id or .gguf file.")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help='A .jsonl file, a line being {"id": "a", "turns": ["..."]}. [default: our own]')
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens in an answer.")] = 256,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """Have another model grade what FILE answers, and compare it with what its source answers.

    Questions and answers go to the endpoint, and nowhere else. The key is that of OPENAI_API_KEY, where one is needed.

    Examples:

        lqexport judge model.gguf --endpoint http://localhost:8000/v1 --model judge --against ./model
        lqexport judge ./model-3bit --endpoint https://api.openai.com/v1 --model NAME --questions mine.jsonl --json
    """
    with plain_endings():
        for name in filter(None, (file, against)):
            check_source_name(name)
        from lqexport.evaluation import judging

        with terminal_listener() as listener:
            result = judging.judge(
                file, endpoint, model, against=against, questions=questions, tokens=tokens, device=device,
                listener=listener,
            )  # fmt: skip
        print_result(result, judging.table, as_json=as_json)
