"""`lqexport eval`: perplexity as the papers measure it, and tasks of lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
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
from lqexport.models.any_model import open_model
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


def test_a_source_is_measured_as_verify_measures_it(folder: Path, tiny_model: Path, text: Path) -> None:
    (actual,) = perplexity(tiny_model, [str(text)], protocol="llama.cpp-512", windows=2)
    (expected,) = verify(folder.with_name("plain.gguf"), str(tiny_model), text=str(text), windows=2).evaluations
    assert actual.perplexity == pytest.approx(expected.reference_perplexity, rel=1e-12)
    assert actual.error == pytest.approx(expected.reference_perplexity_error, rel=1e-12)


@pytest.mark.parametrize("float_type", ["gguf:F16", "gguf:BF16"])
def test_a_file_of_floats_is_measured(
    float_type: str, rounded_artifact: Callable[..., Artifact], tiny_model: Path, text: Path, tmp_path: Path
) -> None:
    gguf_writer.write(rounded_artifact(tmp_path / "artifact", float_type), tmp_path / "model.gguf")
    options: dict[str, Any] = {"protocol": "llama.cpp-512", "windows": 1}
    ours, source = (perplexity(file, [str(text)], **options)[0] for file in (tmp_path / "model.gguf", tiny_model))
    assert ours.perplexity == pytest.approx(source.perplexity, rel=0.01)


def test_a_source_is_measured_beside_its_file(folder: Path, tiny_model: Path, text: Path) -> None:
    arguments = ["eval", str(folder), "--against", str(tiny_model), "--text", str(text), "--windows", "1"]
    arguments += ["--protocol", "llama.cpp-512"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.splitlines()[0].split() == ["on", "measure", "file", "source", "difference"]
    content = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert (content["file"], content["against"]) == (str(folder), str(tiny_model))
    for key, model in (("perplexities", folder), ("source_perplexities", tiny_model)):
        (alone,) = perplexity(model, [str(text)], protocol="llama.cpp-512", windows=1)
        assert content[key][0]["perplexity"] == pytest.approx(alone.perplexity, rel=1e-12)
    file, source = content["perplexities"][0]["perplexity"], content["source_perplexities"][0]["perplexity"]
    assert f"{file - source:+.4f}" in shown.stdout


def test_models_that_split_a_text_otherwise_are_refused_before_they_run(
    folder: Path, tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()  # the last token is spelled by two others
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr(papers, "BlockModel", lambda *_: pytest.fail("a model ran"))
    with pytest.raises(UserError, match=r"native and .*other split .* into other tokens"):
        scores.evaluate(folder, ["python-docs"], [], against=other, protocol="llama.cpp-512", device="cpu")


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
    model, tokenizer = runnable(open_model(file), torch.device("cpu"), torch.float32), tokenizer_of(file)
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
def test_a_task_of_the_harness(
    folder: Path, tiny_model: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    for file in [*files(folder), tiny_model]:
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
    monkeypatch.setattr(scores, "cut_texts", lambda *_, **__: pytest.fail("the text was read"))
    with pytest.raises(UserError, match=r"^The questions of far_away cannot be loaded \(.+\)\. The harness's tasks"):
        scores.evaluate(folder, texts, ["far_away"], include=tmp_path, device="cpu")


def test_a_model_that_cannot_run_as_a_whole_is_said_before_any_work(
    folder: Path, experts_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers stacks experts. That was said when the tasks began, after hours on a text."""
    monkeypatch.setattr(scores, "cut_texts", lambda *_, **__: pytest.fail("the text was read"))
    monkeypatch.setattr(zero_shot_tasks, "opened_tasks", lambda *_: None)
    with pytest.raises(UserError, match=r"transformers keeps .*experts.* in another form than .*experts0?, which"):
        scores.evaluate(folder, ["python-heldout"], ["arc_easy"], against=experts_model, device="cpu")


@needs_harness
def test_a_missing_folder_of_tasks_is_named(folder: Path, tmp_path: Path) -> None:
    """The harness took it for an empty one, so that the task was said to be unknown."""
    with pytest.raises(UserError, match=r"There is no folder .*mine\. Give --include"):
        zero_shot(folder, ["tiny_choices"], include=tmp_path / "mine", device="cpu")


@needs_harness
def test_the_example_tasks(folder: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.chdir(root)
    include = root / "examples" / "tasks"
    for task in include.glob("*.yaml"):
        (score,) = zero_shot(folder, [task.stem], include=include, limit=4, device="cpu")
        assert (score.task, score.value * 4 % 1) == (task.stem, 0)


@needs_harness
def test_the_command(folder: Path, tiny_model: Path, tasks: Path, text: Path) -> None:
    arguments = [
        "eval",
        str(folder),
        "--against",
        str(tiny_model),
        "--text",
        str(text),
        "--windows",
        "1",
        "--protocol",
        "llama.cpp-512",
    ]
    arguments += ["--tasks", "tiny_choices", "--include", str(tasks), "--limit", "2", "--device", "cpu"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "tiny_choices" in shown.stdout
    content = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert math.isclose(content["perplexities"][0]["perplexity"], perplexity(
        folder, [str(text)], protocol="llama.cpp-512", windows=1)[0].perplexity)  # fmt: skip
    for key in ("tasks", "source_tasks"):
        assert [score["value"] in (0, 0.5, 1) for score in content[key]] == [True]
    assert "lm_eval" in content["versions"]


def test_what_is_missing_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ([], ["--tasks", ","]):
        shown = CliRunner().invoke(app, ["eval", str(folder), *options])
        assert (shown.exit_code, "Say what to evaluate" in shown.stderr) == (2, True)
    monkeypatch.setattr(zero_shot_tasks.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install '\.\[eval\]'"):
        zero_shot(folder, ["arc_easy"])
