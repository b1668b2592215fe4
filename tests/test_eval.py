"""`lqexport eval`: perplexity as the papers measure it, and tasks of lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lqexport.calibration.texts import HUB_TEXTS
from lqexport.cli.app import app
from lqexport.converters.folders import native
from lqexport.converters.gguf import writer as gguf_writer
from lqexport.errors import UserError
from lqexport.evaluation import papers, scores, zero_shot_tasks
from lqexport.evaluation.papers import perplexity
from lqexport.evaluation.protocols import HF_2048, tokenize
from lqexport.evaluation.whole_models import runnable
from lqexport.evaluation.zero_shot_tasks import zero_shot
from lqexport.models.tokenizers import tokenizer_of
from lqexport.storage.artifact import Artifact
from lqexport.verification.verifying import verify

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="the extra `eval` is missing")


@pytest.fixture(scope="module")
def folder(rounded_artifact: Callable[..., Artifact], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native folder with low-rank corrections. Beside it are its artifact and a .gguf file in F16."""
    base = tmp_path_factory.mktemp("eval")
    native.write(rounded_artifact(base / "artifact", "native:table-3", 8), base / "native")
    gguf_writer.write(rounded_artifact(base / "plain", "gguf:F16"), base / "plain.gguf")
    return base / "native"


def files(folder: Path) -> list[Path]:
    return [folder, folder.with_name("artifact"), folder.with_name("plain.gguf")]


# Perplexity.


def test_perplexity_is_that_of_verify(folder: Path, tiny_model: Path, text: Path) -> None:
    for file in files(folder):
        (actual,) = perplexity(file, [str(text)], protocol="llama.cpp-512", windows=2)
        (expected,) = verify(file, str(tiny_model), text=str(text), windows=2).evaluations
        assert actual.perplexity == pytest.approx(expected.perplexity, rel=1e-12)
        assert actual.error == pytest.approx(expected.perplexity_error, rel=1e-12)
        assert (actual.windows, actual.tokens) == (expected.windows, expected.tokens)


def test_an_unknown_protocol_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="Unknown protocol 'ppl'"):
        perplexity(folder, ["wikitext2"], protocol="ppl")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, text: Path) -> dict[str, list[str]]:
    """Replaces the hub by 1200 documents for each text, six of them long.

    Returns the documents, and the splits that were asked for in `asked`.
    """
    datasets = pytest.importorskip("datasets")
    content = text.read_text()
    draw = np.random.default_rng(0)
    sizes = np.where(np.arange(1200) % 200, draw.integers(1, 40, 1200), 12_000)
    pieces = [content[start : start + size] for start, size in zip(draw.integers(0, 60_000, 1200), sizes, strict=True)]
    seen: dict[str, list[str]] = {"documents": pieces, "asked": []}

    def load_dataset(path: str, name: str | None, *, split: str, **_: Any) -> Any:
        seen["asked"].append(split)
        column = next(text.column for text in HUB_TEXTS.values() if text.path == path)
        return ({column: piece} for piece in pieces)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return seen


@pytest.mark.parametrize(
    ("name", "split", "separator", "most"),
    [("wikitext2", "test", "\n\n", None), ("ptb", "validation", "\n\n", None), ("ptb-new", "test", " ", None),
     ("c4-new", "validation", " ", 1100)],
)  # fmt: skip
def test_joined_texts(
    name: str, split: str, separator: str, most: int | None, hub: dict[str, list[str]], folder: Path
) -> None:
    tokenizer = tokenizer_of(folder)
    windows = papers.TEXTS[name](tokenizer, HF_2048)
    tokens = tokenize(tokenizer, separator.join(hub["documents"][:most]))
    assert hub["asked"] == [split]
    assert windows.shape == (min(len(tokens) // 2048, 256 if most else 10**6), 2048)
    assert np.array_equal(windows.reshape(-1), tokens[: windows.size])


def test_c4_takes_places_in_long_documents(
    hub: dict[str, list[str]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(papers, "WINDOWS", 4)
    tokenizer = tokenizer_of(folder)
    windows = papers.TEXTS["c4"](tokenizer, HF_2048)
    assert windows.shape == (4, 2048)
    long = [tokenize(tokenizer, piece) for piece in hub["documents"] if len(piece) == 12_000]
    for window in windows:
        assert any(window.tobytes() in tokens.tobytes() for tokens in long)
    assert len({window.tobytes() for window in windows}) == 4
    assert np.array_equal(papers.TEXTS["c4"](tokenizer, HF_2048), windows)


def test_c4_without_long_documents_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(papers, "documents", lambda *_: ["short"])
    with pytest.raises(UserError, match="more than 2048 tokens"):
        papers.TEXTS["c4"](tokenizer_of(folder), HF_2048)


# Tasks.

CHOICES = [" return", " import", " banana", " x"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a harness task with six questions of four choices."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = [{"q": f"def f{i}(x):\n   ", "choices": CHOICES, "answer": i % 4} for i in range(6)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (folder / "tiny.yaml").write_text(
        f"""task: tiny_choices
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/questions.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_target: answer
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""
    )
    return folder


def by_hand(file: Path) -> float:
    """Returns the share of questions whose right answer has the largest log-likelihood."""
    model, tokenizer = runnable(file, torch.device("cpu"), torch.float32), tokenizer_of(file)
    right = 0
    for i in range(6):
        prompt = tokenizer(f"def f{i}(x):\n   ")["input_ids"]
        likelihoods = []
        for choice in CHOICES:
            ids = tokenizer(f"def f{i}(x):\n   {choice}")["input_ids"]
            with torch.no_grad():
                predicted = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            likelihoods.append(sum(float(predicted[j - 1, ids[j]]) for j in range(len(prompt), len(ids))))
        right += int(np.argmax(likelihoods)) == i % 4
    return right / 6


@needs_harness
def test_a_task_of_the_harness(folder: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    for file in files(folder):
        (score,) = zero_shot(file, ["tiny_choices"], include=tasks, device="cpu")
        assert (score.task, score.metric) == ("tiny_choices", "acc")
        assert score.value == pytest.approx(by_hand(file))
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **_: SimpleNamespace(match_tasks=lambda _: []))
    with pytest.raises(UserError, match="no task nothing_such"):
        zero_shot(folder, ["nothing_such"])


@needs_harness
@pytest.mark.parametrize("texts", [[], ["python-heldout"]])
def test_tasks_out_of_reach_are_said_before_any_work(
    texts: list[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The questions are on the hub, which no test reaches: the model was loaded and the text read before that."""
    (tmp_path / "far.yaml").write_text("task: far_away\ndataset_path: someone/somewhere\noutput_type: generate_until\n")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(zero_shot_tasks, "runnable", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr(scores, "perplexity", lambda *_, **__: pytest.fail("the text was read"))
    with pytest.raises(UserError, match=r"^The questions of far_away cannot be loaded \(.+\)\. The harness's tasks"):
        scores.evaluate(folder, texts, ["far_away"], include=tmp_path, device="cpu")


@needs_harness
def test_the_example_tasks(folder: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.chdir(root)
    include = root / "examples" / "tasks"
    for task in include.glob("*.yaml"):
        (score,) = zero_shot(folder, [task.stem], include=include, limit=4, device="cpu")
        assert (score.task, score.value * 4 % 1) == (task.stem, 0)


@needs_harness
def test_the_command(folder: Path, tasks: Path, text: Path) -> None:
    arguments = ["eval", str(folder), "--text", str(text), "--windows", "1", "--protocol", "llama.cpp-512"]
    arguments += ["--tasks", "tiny_choices", "--include", str(tasks), "--limit", "2", "--device", "cpu"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "tiny_choices" in shown.stdout
    content = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert math.isclose(content["perplexities"][0]["perplexity"], perplexity(
        folder, [str(text)], protocol="llama.cpp-512", windows=1)[0].perplexity)  # fmt: skip
    assert content["tasks"][0]["value"] in (0, 0.5, 1)
    assert "lm_eval" in content["versions"]


def test_what_is_missing_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert CliRunner().invoke(app, ["eval", str(folder)]).exit_code == 2
    monkeypatch.setattr(zero_shot_tasks.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install '\.\[eval\]'"):
        zero_shot(folder, ["arc_easy"])
