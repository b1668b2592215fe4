"""`lqexport judge`: another model, behind an OpenAI-compatible endpoint, grades the answers of a written model.

The method is that of MT-Bench (Zheng et al. 2023): single-answer grading from 1 to 10, and pairwise comparison with the
source's answers in both orders, where only a verdict that holds in both orders counts. The whole conversation is judged
at once.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.table import Table

from lqexport.errors import UserError, check_least, files_at_hand, install
from lqexport.evaluation.chat import Question, answer, read_questions
from lqexport.evaluation.figures import finite_or_null, with_error
from lqexport.evaluation.whole_models import check_runnable, runnable
from lqexport.models.any_model import AnyModel, open_model
from lqexport.runtime.environment import PACKAGES, choose_device, versions
from lqexport.runtime.progress import Listener, Silent
from lqexport.runtime.shown import Shown

MISSING = f"The judge needs the package openai: {install('judge')}"
CRITERIA = "Weigh whether what it says is correct, to the point, complete and clear. Length alone is no merit."
GRADE = f"""Grade how well the assistant serves the user in the conversation below. {CRITERIA} Reason in a few
sentences, then end with a grade from 1 (useless) to 10 (excellent) in double brackets, such as [[5]].

{{}}"""
COMPARE = f"""Two assistants, A and B, served the same user. Say which did better. {CRITERIA} Nor does it matter which
one stands first. Reason in a few sentences, then end with [[A]], [[B]], or [[C]] where neither is better.

=== Conversation with A ===
{{}}

=== Conversation with B ===
{{}}"""
FIRST = "Reply with the word ready."
"""What the judge is asked before any work, to learn that it answers."""

Ask = Callable[[str], str]
"""A function that sends the judge a message and returns its reply."""
Verdict = Literal["better", "worse", "same"]
"""The judge's comparison of the file with the source."""


@dataclass(frozen=True)
class Judged:
    """The answers to one question, and the judge's grades and verdict.

    answers, source_answers   one per turn; source_answers is empty without a source
    grade, source_grade   from 1 to 10; None if the judge's reply holds no grade
    verdict               the file compared with the source; None without a source, or if a reply holds no verdict
    replies               the judge's replies, in the order in which it was asked
    """

    question: Question
    answers: list[str]
    source_answers: list[str]
    grade: float | None
    source_grade: float | None
    verdict: Verdict | None
    replies: list[str]


@dataclass(frozen=True, repr=False)
class Judgement(Shown):
    """The judge's results for one file.

    against    the source that the file was compared with; None if there was none
    endpoint, model   the address of the judge's API, and the judge's name there
    judged     the results, one per question
    versions   of the packages that were used
    """

    file: str
    against: str | None
    endpoint: str
    model: str
    judged: list[Judged]
    versions: dict[str, str]

    @property
    def grades(self) -> list[float]:
        """The file's grades, without the questions that have none."""
        return [each.grade for each in self.judged if each.grade is not None]

    @property
    def source_grades(self) -> list[float]:
        """The source's grades, without the questions that have none."""
        return [each.source_grade for each in self.judged if each.source_grade is not None]

    def count(self, verdict: Verdict | None) -> int:
        """Returns the number of questions with this verdict; None: without one."""
        return sum(each.verdict == verdict for each in self.judged)

    def as_json(self) -> dict[str, Any]:
        """Returns everything as JSON values; NaN and infinity become null."""
        return finite_or_null(asdict(self))


@files_at_hand()
def judge(
    file: str | Path,
    endpoint: str,
    model: str,
    *,
    against: str | None = None,
    questions: str | Path | None = None,
    tokens: int = 256,
    device: str = "auto",
    listener: Listener | None = None,
) -> Judgement:
    """Lets a written model answer questions, and another model judge the answers.

    file       a .gguf file, a folder that lqexport wrote, or a Hugging Face folder or hub id, quantized or not; the
               low-rank corrections of a written model are added
    endpoint   the address of an OpenAI-compatible API, such as http://localhost:8000/v1
    model      the judge's name at the endpoint
    against    the source model: its answers are graded too, and compared with the file's
    questions  a file as `chat.read_questions` reads it; None: the few questions that come with lqexport
    tokens     the most tokens of an answer

    The environment variable OPENAI_API_KEY holds the key, if the endpoint wants one. Raises UserError if the package
    openai is missing, a model or the questions cannot be read, or the endpoint does not answer: it is asked a first
    question before the file answers any, which may take long.
    """
    check_least(1, tokens=tokens)
    ask, listener = asking(endpoint, model), listener or Silent()
    question_list = read_questions(Path(questions) if questions else None)
    chosen = choose_device(device)
    models = [open_model(name) for name in (file, against) if name is not None]
    for each in models:
        check_runnable(each)
    tokenizers = [each.tokenizer() for each in models]
    ask(FIRST)
    answers = [
        _answers(each, tokenizer, question_list, tokens, chosen, listener)
        for each, tokenizer in zip(models, tokenizers, strict=True)
    ]
    source_answers: list[list[str]] = answers[1] if against is not None else [[] for _ in question_list]
    listener.stage(f"Ask {model}", len(question_list))
    judged = []
    for entry in zip(question_list, answers[0], source_answers, strict=True):
        judged.append(judged_answers(ask, *entry))
        listener.advance(1)
    return Judgement(str(file), against, endpoint, model, judged, versions(*PACKAGES, "openai"))


def _answers(
    opened: AnyModel, tokenizer: Any, questions: Sequence[Question], tokens: int, device: torch.device,
    listener: Listener,
) -> list[list[str]]:  # fmt: skip
    """Returns a model's answers to all questions, computed in float32. The model is freed at the end."""
    listener.stage("Answer the questions", len(questions))
    model, answers = runnable(opened, device, torch.float32), []
    for question in questions:
        answers.append(answer(model, tokenizer, question.turns, tokens))
        listener.advance(1)
    return answers


def asking(endpoint: str, model: str) -> Ask:
    """Returns a function that asks the judge.

    Raises UserError if the package openai is missing, or the endpoint is no address. The function raises UserError if
    the endpoint does not answer.
    """
    if not re.match("https?://", endpoint):
        raise UserError(f"The endpoint {endpoint} is no address such as http://localhost:8000/v1.")
    if importlib.util.find_spec("openai") is None:
        raise UserError(MISSING)
    from openai import OpenAI, OpenAIError

    client = OpenAI(base_url=endpoint, api_key=os.environ.get("OPENAI_API_KEY", "none"))

    def ask(message: str) -> str:
        try:
            reply = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": message}], temperature=0
            )
        except OpenAIError as error:
            raise UserError(f"{endpoint} does not answer as {model}: {error}") from error
        return reply.choices[0].message.content or ""

    return ask


def judged_answers(ask: Ask, question: Question, answers: list[str], source_answers: list[str]) -> Judged:
    """Asks the judge to grade the answers to one question, and to compare them with the source's answers, if any."""
    by_file, by_source = (_conversation(question, each) for each in (answers, source_answers))
    messages = [GRADE.format(by_file)]
    if source_answers:
        messages += [GRADE.format(by_source), COMPARE.format(by_file, by_source), COMPARE.format(by_source, by_file)]
    replies = [ask(message) for message in messages]
    grades = [grade(reply) for reply in replies[:2]]
    return Judged(
        question, answers, source_answers, grades[0], grades[1] if source_answers else None,
        verdict(*replies[2:]) if source_answers else None, replies,
    )  # fmt: skip


def _conversation(question: Question, answers: Sequence[str]) -> str:
    turns = zip(question.turns, answers, strict=False)
    return "\n\n".join(f"User: {said}\n\nAssistant: {answered}" for said, answered in turns)


def grade(reply: str) -> float | None:
    """Returns the last grade in a judge's reply; None if there is none or it is not from 1 to 10."""
    grades = re.findall(r"\[\[(\d+(?:\.\d+)?)\]\]", reply)
    return float(grades[-1]) if grades and 1 <= float(grades[-1]) <= 10 else None


def verdict(file_first: str, source_first: str) -> Verdict | None:
    """Returns the verdict on the file from two replies of the judge.

    file_first, source_first   the replies to the comparison in which the file is A, and to that in which it is B

    The file is better or worse only if both replies say so, else the same. None if a reply holds no verdict.
    """
    letters = [re.findall(r"\[\[([ABC])\]\]", reply) for reply in (file_first, source_first)]
    if not all(letters):
        return None
    last = letters[0][-1], letters[1][-1]
    return {("A", "B"): "better", ("B", "A"): "worse"}.get(last, "same")  # type: ignore[return-value]  # mypy widens


def table(judgement: Judgement) -> Table:
    """Returns the table that `lqexport judge` prints."""
    result = Table(box=None, pad_edge=False)
    for title in ("", judgement.model):
        result.add_column(title, justify="right" if title else "left")
    result.add_row("questions", str(len(judgement.judged)))
    result.add_row("grade of the file, 1 to 10", _mean(judgement.grades))
    if judgement.against is not None:
        result.add_row("grade of the source", _mean(judgement.source_grades))
        shown = [f"{judgement.count('better')} / {judgement.count('same')} / {judgement.count('worse')}"]
        result.add_row("file better / same / worse", *shown)
        result.add_row("no verdict", str(judgement.count(None)))
    result.add_row("no grade", str(len(judgement.judged) - len(judgement.grades)))
    return result


def _mean(grades: list[float]) -> str:
    """Returns the mean of the grades with one standard error, or `none` without grades."""
    error = float(np.std(grades, ddof=1)) / len(grades) ** 0.5 if len(grades) > 1 else float("nan")
    return with_error(float(np.mean(grades)), error, 2) if grades else "none"
