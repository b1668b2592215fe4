"""`lqexport judge`: another model, behind an OpenAI-compatible endpoint, grades what a written model answers.

After MT-Bench (Zheng et al. 2023): single-answer grading from 1 to 10, and pairwise comparison with the source's
answers, in both orders, where only what holds in both counts. The whole conversation is judged at once.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.table import Table

from lqexport.errors import UserError
from lqexport.evaluation.chat import Question, answer, read_questions
from lqexport.evaluation.figures import finite_or_null, with_error
from lqexport.evaluation.zero_shot_tasks import dense, runnable
from lqexport.models.source import open_source
from lqexport.models.tokenizers import tokenizer_of
from lqexport.runtime.environment import PACKAGES, choose_device, versions
from lqexport.runtime.progress import Listener, Silent

MISSING = "The judge needs the package openai: pip install 'lqexport[judge]'"
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

Ask = Callable[[str], str]
"""Sends the judge a message and returns its reply."""
Verdict = Literal["better", "worse", "same"]


@dataclass(frozen=True)
class Judged:
    """One question: what was answered, and what the judge made of it.

    grade, source_grade   1 to 10; None where the judge's reply holds none
    verdict               of the file against the source; None without a source, or where a reply holds none
    replies               the judge's, in the order in which they came
    """

    question: Question
    answers: list[str]
    source_answers: list[str]
    grade: float | None
    source_grade: float | None
    verdict: Verdict | None
    replies: list[str]


@dataclass(frozen=True)
class Judgement:
    """Of one file, with what it was made by. `against` is None where there was no source to compare with."""

    file: str
    against: str | None
    endpoint: str
    model: str
    judged: list[Judged]
    versions: dict[str, str]

    @property
    def grades(self) -> list[float]:
        return [each.grade for each in self.judged if each.grade is not None]

    @property
    def source_grades(self) -> list[float]:
        return [each.source_grade for each in self.judged if each.source_grade is not None]

    def count(self, verdict: Verdict | None) -> int:
        """Questions with this verdict."""
        return sum(each.verdict == verdict for each in self.judged)

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return finite_or_null(asdict(self))


def judge(
    file: str | Path,
    endpoint: str,
    model: str,
    *,
    against: str | None = None,
    questions: Path | None = None,
    tokens: int = 256,
    device: str = "auto",
    listener: Listener | None = None,
) -> Judgement:
    """Have a written model answer questions, and another one judge the answers.

    file       .gguf file, native or EXL2 folder, artifact, with its corrections
    endpoint   address of an OpenAI-compatible API, such as http://localhost:8000/v1
    model      what the endpoint calls the judge
    against    the source: its answers are graded too, and compared pairwise
    questions  a file for `answers.read_questions`; None: our own few
    tokens     at most so many in an answer

    The key is OPENAI_API_KEY's, where the endpoint wants one. Raises UserError where openai is missing, a model or the
    questions cannot be read, or the endpoint does not answer.
    """
    ask, asked, listener = asking(endpoint, model), read_questions(questions), listener or Silent()
    place = choose_device(device)
    answers = _answers(partial(runnable, Path(file)), tokenizer_of(Path(file)), asked, tokens, place, listener)
    others: list[list[str]] = [[] for _ in asked]
    if against is not None:
        source = open_source(against)
        others = _answers(partial(dense, source), source.tokenizer(), asked, tokens, place, listener)
    listener.stage(f"Ask {model}", len(asked))
    judged = []
    for entry in zip(asked, answers, others, strict=True):
        judged.append(judged_answers(ask, *entry))
        listener.advance(1)
    return Judgement(str(file), against, endpoint, model, judged, versions(*PACKAGES, "openai"))


def _answers(
    load: Callable[[torch.device, torch.dtype], Any], tokenizer: Any, asked: Sequence[Question], tokens: int,
    device: torch.device, listener: Listener,
) -> list[list[str]]:  # fmt: skip
    """A model's answers to all questions, in float32. The model is gone afterwards."""
    listener.stage("Answer the questions", len(asked))
    model, found = load(device, torch.float32), []
    for question in asked:
        found.append(answer(model, tokenizer, question.turns, tokens))
        listener.advance(1)
    return found


def asking(endpoint: str, model: str) -> Ask:
    """A function that asks the judge. Raises UserError where the package is missing, and when called, where no reply
    comes."""
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


def judged_answers(ask: Ask, question: Question, answers: list[str], others: list[str]) -> Judged:
    """Grade one question's answers; with those of the source, if any, grade these and compare."""
    mine, theirs = (_conversation(question, each) for each in (answers, others))
    messages = [GRADE.format(mine)]
    if others:
        messages += [GRADE.format(theirs), COMPARE.format(mine, theirs), COMPARE.format(theirs, mine)]
    replies = [ask(message) for message in messages]
    grades = [grade(reply) for reply in replies[:2]]
    return Judged(
        question, answers, others, grades[0], grades[1] if others else None,
        verdict(*replies[2:]) if others else None, replies,
    )  # fmt: skip


def _conversation(question: Question, answers: Sequence[str]) -> str:
    turns = zip(question.turns, answers, strict=False)
    return "\n\n".join(f"User: {said}\n\nAssistant: {answered}" for said, answered in turns)


def grade(reply: str) -> float | None:
    """The last grade in a judge's reply; None where there is none from 1 to 10."""
    found = re.findall(r"\[\[(\d+(?:\.\d+)?)\]\]", reply)
    return float(found[-1]) if found and 1 <= float(found[-1]) <= 10 else None


def verdict(file_first: str, source_first: str) -> Verdict | None:
    """What two replies say of the file, which is A in the first and B in the second: better or worse only where both
    say so. None where one says nothing."""
    found = [re.findall(r"\[\[([ABC])\]\]", reply) for reply in (file_first, source_first)]
    if not all(found):
        return None
    said = found[0][-1], found[1][-1]
    return {("A", "B"): "better", ("B", "A"): "worse"}.get(said, "same")  # type: ignore[return-value]  # mypy widens


def table(found: Judgement) -> Table:
    """What `lqexport judge` prints."""
    result = Table(box=None, pad_edge=False)
    for title in ("", found.model):
        result.add_column(title, justify="right" if title else "left")
    result.add_row("questions", str(len(found.judged)))
    result.add_row("grade of the file, 1 to 10", _mean(found.grades))
    if found.against is not None:
        result.add_row("grade of the source", _mean(found.source_grades))
        shown = [f"{found.count('better')} / {found.count('same')} / {found.count('worse')}"]
        result.add_row("file better / same / worse", *shown)
        result.add_row("no verdict", str(found.count(None)))
    result.add_row("no grade", str(len(found.judged) - len(found.grades)))
    return result


def _mean(grades: list[float]) -> str:
    """With one standard error."""
    error = float(np.std(grades, ddof=1)) / len(grades) ** 0.5 if len(grades) > 1 else float("nan")
    return with_error(float(np.mean(grades)), error, 2) if grades else "none"
