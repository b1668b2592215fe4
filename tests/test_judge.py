"""`lqexport judge`, tested with a local endpoint that answers as OpenAI's chat API does."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lqexport.cli.app import app
from lqexport.converters.folders import native
from lqexport.errors import UserError
from lqexport.evaluation import judging
from lqexport.evaluation.chat import Question, answer, read_questions
from lqexport.evaluation.judging import asking, grade, judge, judged_answers, verdict
from lqexport.evaluation.whole_models import runnable
from lqexport.models.any_model import open_model
from lqexport.models.tokenizers import tokenizer_of
from lqexport.storage.artifact import Artifact

needs_client = pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="the extra `judge` is missing")
TWO_TURNS = Question("a", ("Say one.", "Say two."))


class Endpoint(ThreadingHTTPServer):
    """An endpoint that answers a message with `reply(message)` and keeps the requests."""

    def __init__(self, reply: Callable[[str], str]) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.reply = reply
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []


class Answers(BaseHTTPRequestHandler):
    server: Endpoint

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        self.server.keys.append(self.headers["Authorization"])
        message = {"role": "assistant", "content": self.server.reply(request["messages"][0]["content"])}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        known = self.path == "/v1/chat/completions" and request["model"] == "judge"
        content = {"id": "1", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}
        body = json.dumps(content if known else {"error": {"message": "no such model"}}).encode()
        self.send_response(200 if known else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def endpoint(served: Callable[[Endpoint], Endpoint]) -> Endpoint:
    """A judge that grades every answer 7, and prefers the answer that comes first."""
    return served(Endpoint(lambda message: "So [[A]]." if "=== Conversation with A" in message else "Fine. [[7]]"))


def address(endpoint: Endpoint) -> str:
    return f"http://127.0.0.1:{endpoint.server_port}/v1"


@pytest.fixture(scope="module")
def folder(rounded_artifact: Callable[..., Artifact], tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("judge")
    native.write(rounded_artifact(base / "artifact", "native:table-3"), base / "folder")
    return base / "folder"


@needs_client
def test_the_command(
    folder: Path, tiny_model: Path, endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "key of the test")
    (tmp_path / "mine.jsonl").write_text('{"question_id": 81, "turns": ["def f(x):", "    return"]}\n\n')
    arguments = ["judge", str(folder), "--endpoint", address(endpoint), "--model", "judge", "--device", "cpu"]
    arguments += ["--questions", str(tmp_path / "mine.jsonl"), "--against", str(tiny_model), "--tokens", "4"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    (judged,) = json.loads(done.stdout)["judged"]
    assert judged["question"] == {"id": "81", "turns": ["def f(x):", "    return"]}
    assert [len(judged[name]) for name in ("answers", "source_answers", "replies")] == [2, 2, 4]
    assert (judged["grade"], judged["source_grade"], judged["verdict"]) == (7, 7, "same")
    assert len(endpoint.requests) == 1 + 4
    assert set(endpoint.keys) == {"Bearer key of the test"}
    first, *messages = [request["messages"][0]["content"] for request in endpoint.requests]
    assert first == judging.FIRST
    assert all(text in messages[0] for text in ("def f(x):", *judged["answers"]))
    assert "Conversation with A" not in messages[0]
    assert messages[2].index("Conversation with A") < messages[2].index("Conversation with B")
    shown = CliRunner().invoke(app, arguments).stdout
    for text in ("7.00", "0 / 1 / 0", "no verdict"):
        assert text in shown


@needs_client
def test_a_file_alone_is_graded_by_our_own_questions(folder: Path, endpoint: Endpoint) -> None:
    judgement = judge(folder, address(endpoint), "judge", tokens=1, device="cpu")
    assert len(judgement.judged) == len(endpoint.requests) - 1 == len(read_questions())
    assert judgement.grades == [7.0] * len(judgement.judged)
    assert judgement.source_grades == []


@needs_client
def test_an_endpoint_that_does_not_answer_is_named(endpoint: Endpoint) -> None:
    with pytest.raises(UserError, match=r"127\.0\.0\.1.* does not answer as other: .*no such model"):
        asking(address(endpoint), "other")("Hello")


@needs_client
@pytest.mark.parametrize("reachable", [True, False])
def test_an_endpoint_that_does_not_answer_is_said_before_any_work(
    reachable: bool, folder: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was asked only after the file had answered all questions, for minutes."""
    monkeypatch.setattr(judging, "runnable", lambda *_: pytest.fail("the file was loaded"))
    url = address(endpoint) if reachable else "http://127.0.0.1:9/v1"
    with pytest.raises(UserError, match="does not answer as other"):
        judge(folder, url, "other", tokens=1, device="cpu")


def test_an_endpoint_without_a_scheme_is_named() -> None:
    """The client says of it that there is no connection."""
    with pytest.raises(UserError, match=r"The endpoint localhost:8000/v1 is no address such as http://"):
        asking("localhost:8000/v1", "judge")


def test_a_missing_client_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install '\.\[judge\]'"):
        asking("http://nowhere", "judge")


@pytest.mark.parametrize(
    ("replies", "expected"),
    [("AB", "better"), ("BA", "worse"), ("AA", "same"), ("BB", "same"), ("CC", "same"), ("AC", "same"), ("A-", None)],
)
def test_only_what_holds_in_both_orders_counts(replies: str, expected: str | None) -> None:
    assert verdict(*(f"First [[C]], no: [[{reply}]]" if reply != "-" else "Neither." for reply in replies)) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [("[[7]]", 7), ("not [[2]] but [[8.5]]", 8.5), ("[[11]]", None), ("[[0]]", None), ("8", None)],
)
def test_grades(reply: str, expected: float | None) -> None:
    assert grade(reply) == expected


def test_a_judge_of_sense_is_followed_in_either_order() -> None:
    def ask(message: str) -> str:
        if "Conversation with A" not in message:
            return "[[9]]" if "good" in message else "[[2]]"
        return "[[A]]" if message.index("good") < message.index("bad") else "[[B]]"

    judged = judged_answers(ask, TWO_TURNS, ["good", "good"], ["bad", "bad"])
    assert (judged.grade, judged.source_grade, judged.verdict) == (9, 2, "better")
    judged = judged_answers(ask, TWO_TURNS, ["bad", "bad"], ["good", "good"])
    assert (judged.grade, judged.source_grade, judged.verdict) == (2, 9, "worse")


def test_an_answer_is_the_likeliest_continuation_of_the_conversation(folder: Path) -> None:
    model, tokenizer = runnable(open_model(folder), torch.device("cpu"), torch.float32), tokenizer_of(folder)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    first, second = answer(model, tokenizer, ["one", "two"], 3)
    ids = tokenizer("<user>one<assistant>")["input_ids"]
    for _ in range(3):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert first == tokenizer.decode(ids[-3:], skip_special_tokens=True).strip()
    assert answer(model, tokenizer, ["two"], 3) != [second]


def test_a_template_that_refuses_a_question_is_said(folder: Path) -> None:
    model, tokenizer = runnable(open_model(folder), torch.device("cpu"), torch.float32), tokenizer_of(folder)
    tokenizer.chat_template = "{{ raise_exception('no users') }}"
    with pytest.raises(UserError, match="chat template refuses a conversation: no users"):
        answer(model, tokenizer, ["one"], 3)


def test_a_question_may_hold_a_line_separator(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"id": "a", "turns": ["one\u2028two"]}\n\n', encoding="utf-8")
    assert read_questions(tmp_path / "mine.jsonl") == [Question("a", ("one\u2028two",))]


def test_a_missing_file_of_questions_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Cannot read the questions .*mine\.jsonl: No such file"):
        read_questions(tmp_path / "mine.jsonl")


@pytest.mark.parametrize(
    "content", ["", "x", '{"turns": "one"}', '{"turns": []}', '{"id": 1}', "[1]", '{"turns": ["cut \\ud83d"]}']
)
def test_a_file_that_holds_no_questions_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"mine\.jsonl"):
        read_questions(tmp_path / "mine.jsonl")
