"""How files talk: chat templates by transformers and llama.cpp, stop tokens, and what source and file say."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import pieces as pieces
from rich.console import Console
from talking_models import CHATML, FORMS, exported_anew
from talking_models import talking as talking
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lqexport.calibration.texts import Text
from lqexport.cli.app import app
from lqexport.evaluation import llamacpp
from lqexport.evaluation.conversations import Conversation, render
from lqexport.models import chat_template
from lqexport.models.source import open_source
from lqexport.models.written import open_export
from lqexport.runtime.progress import Silent
from lqexport.storage.artifact import Artifact
from lqexport.verification import talk_report
from lqexport.verification.chat_templates import _habit, added_ends, around
from lqexport.verification.continuations import least_kl, prompts, suspicious
from lqexport.verification.result import Verification
from lqexport.verification.talk import check_talk
from lqexport.verification.talk_record import Continuation, Talk
from lqexport.verification.verifying import empty_result

Made = dict[str, tuple[Path, Artifact, Path]]
NAMES = list(FORMS)
pytestmark = pytest.mark.llamacpp


@dataclasses.dataclass
class Loss:
    """The part of an evaluation that the check of continuations reads."""

    kl_max: float = 0.001


def talk_of(file: Path, source: Path, engine: str = "lqexport", kl_max: float = 0.001) -> Verification:
    """Returns a result with the checks of this module alone."""
    opened = open_source(str(source))
    result = empty_result(file, opened, None, Text("none", ""), engine, "cpu")
    result.evaluations = [Loss(kl_max)]  # type: ignore[list-item]
    check_talk(result, open_export(file), opened, Silent())
    assert result.talk is not None
    return result


@pytest.mark.parametrize("name", NAMES)
def test_right_files_talk_as_their_source(talking: Made, name: str) -> None:
    source, _, file = talking[name]
    result = talk_of(file, source, "llama.cpp")
    talk = result.talk
    assert (result.failed, result.warnings, talk.not_checked) == ([], [], [])
    assert {rendering.renderer for rendering in talk.renderings} == {"transformers", "llama.cpp"}
    assert all(rendering.same for rendering in talk.renderings)
    assert all(token.in_file and token.stops for token in talk.stops)
    assert [token.ends_turn for token in talk.stops].count(True) == 1
    assert len(talk.continuations) == 3
    assert "listening on" in talk.log
    assert str(file.parent) in talk.log
    assert str(file.parent) not in result.published().talk.log
    notes = {rendering.note for rendering in talk.renderings}
    assert any("date_string" in note for note in notes) == (name == "llama3")
    refused = [sentence.partition(":")[0] for sentence in talk.left_out]
    assert ("a system prompt" in refused) == (name == "gemma")
    assert ("a tool call and its result" in refused) == (name == "gemma")


TWO_SPACES = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant \n")
TOOLS_AS_LIST = CHATML.replace("{{ '\n' + tool | tojson }}", "{{ '\n' + tool.function.name }}")

SPOILED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a space in the generation prompt": (
        "chatml", {"chat_template": TWO_SPACES},
        r"transformers renders 8 of 17 .* first is one turn with a generation prompt: .*assistant \\n",
    ),
    "definitions of tools": (
        "chatml", {"chat_template": TOOLS_AS_LIST},
        r"transformers renders 4 of 17 .* first is definitions of tools",
    ),
    "no template": ("gemma", {"chat_template": None}, "^The source has a chat template, and the file has none"),
    "a template that does not parse": (
        "gemma", {"chat_template": "{% for m in messages %}"}, "^llama.cpp does not understand the chat template: ",
    ),
    "another end of text": (
        "chatml", {"tokenizer_config": {"eos_token": "<unk>"}},
        r"^The file ends an answer at '<unk>' \(0\), where the source does not: its stop tokens are '<\|im_end\|>'",
    ),
    "no BOS": (
        "llama3", {"tokenizer_config": {"add_bos_token": False}},
        r"^llama.cpp renders 1 of 16 conversations .* first is a plain text",
    ),
    "a BOS too many": (
        "chatml", {"tokenizer_config": {"add_bos_token": True}}, "^llama.cpp renders 1[0-9] of 18 conversations",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "files", "sentence"), SPOILED.values(), ids=SPOILED.keys())
def test_what_is_wrong_is_named(talking: Made, name: str, files: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    source, artifact, _ = talking[name]
    result = talk_of(exported_anew(artifact, tmp_path, **files), source)
    assert [text for text in result.failed if re.search(sentence, text)], result.failed


def test_a_stop_token_that_the_file_lacks(talking: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp knows <|im_end|> by its name, so it stops there all the same. It does not know <end>."""
    source, artifact, _ = talking["chatml"]
    file = exported_anew(artifact, tmp_path / "a", tokenizer_config={"eos_token": "</s>"})
    result = talk_of(file, source)
    assert result.failed == []
    assert result.warnings == [
        "The file does not name '<|im_end|>' (502), which ends a turn, as a stop token; llama.cpp knows it by name."
    ]
    source, artifact, _ = talking["gemma"]
    without = exported_anew(artifact, tmp_path / "b", generation_config={"eos_token_id": 2})
    result = talk_of(without, source)
    assert result.failed == ["llama.cpp does not stop at '<end>' (502), which ends a turn, as the source does."]
    monkeypatch.setattr(llamacpp, "server_binary", lambda: None)
    result = talk_of(without, source)
    assert result.failed == [
        "The file does not name '<end>' (502), which ends a turn, as a stop token, as the source does."
    ]
    assert result.talk.not_checked[0].startswith("what llama.cpp does: llama.cpp's server is not installed")
    assert {rendering.renderer for rendering in result.talk.renderings} == {"transformers"}


def test_a_turn_that_does_not_end_in_the_source_either(talking: Made, tmp_path: Path) -> None:
    source, artifact, _ = talking["gemma"]
    other = tmp_path / "source"
    other.mkdir()
    for path in source.iterdir():
        (other / path.name).symlink_to(path)
    (other / "generation_config.json").unlink()
    file = exported_anew(artifact, tmp_path, generation_config={"eos_token_id": 2})
    result = talk_of(file, other)
    assert result.failed == []
    assert result.warnings == [
        "The source's chat template ends a turn with '<end>' (502), at which neither source nor file stops."
    ]


def test_folders_talk_too(talking: Made, tmp_path: Path) -> None:
    """An artifact has the tokenizer's files. llama.cpp does not run it."""
    source, artifact, _ = talking["gemma"]
    result = talk_of(artifact.folder, source)
    assert (result.failed, result.warnings) == ([], [])
    assert result.talk.not_checked[0] == "what llama.cpp does: it does not run folders"
    exported_anew(artifact, tmp_path, chat_template=CHATML, generation_config={"eos_token_id": [2]})
    template, stops = talk_of(tmp_path / "artifact", source).failed
    assert template.startswith("transformers renders 9 of 9 conversations otherwise than the source, by")
    assert stops == "The file does not name '<end>' (502), which ends a turn, as a stop token, as the source does."


def test_a_source_without_a_template(tiny_model: Path, talking: Made) -> None:
    result = talk_of(talking["gemma"][2], tiny_model)
    assert result.talk.template == "the source has none, so there is nothing to compare"
    assert "The file has a chat template, and the source has none." in result.warnings


def test_the_source_says_what_transformers_says(talking: Made, tmp_path: Path) -> None:
    """The file of another model is a bad draft, so the source's text is cut short, but right as far as it goes."""
    source, _, _ = talking["chatml"]
    result = talk_of(talking["llama3"][2], source, "llama.cpp", kl_max=1.0)
    tokenizer = open_source(str(source)).tokenizer()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for entry in result.talk.continuations:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": entry.prompt}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        said = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False)
        text = tokenizer.decode(said[0, prompt.shape[1] :])
        assert text.startswith(entry.source)
        assert entry.source
    assert not [sentence for sentence in result.failed if "its loss on the text" in sentence]


def test_a_difference_without_loss_is_suspicious(talking: Made) -> None:
    source, _, file = talking["gemma"]
    (entry, *_) = talk_of(file, source, "llama.cpp").talk.continuations
    sure = dataclasses.replace(
        entry, difference=3, probability=0.9, file_probability=0.05, least_kl=least_kl(0.9, 0.05)
    )
    near = dataclasses.replace(sure, least_kl=least_kl(0.41, 0.40))
    assert suspicious([entry, sure, near], [Loss(0.001)]) == [sure]  # type: ignore[list-item]
    assert suspicious([sure], [Loss(0.5)]) == []  # type: ignore[list-item]
    assert suspicious([sure], []) == []


def test_least_kl() -> None:
    """No distribution that prefers the second token is nearer to the first."""
    p, q = 0.7, 0.1
    other = 1 - p - q
    grid = [(x, y) for x in torch.linspace(0.01, 0.98, 98).tolist() for y in torch.linspace(x, 0.98, 40).tolist()]
    least = min(
        p * math.log(p / x) + q * math.log(q / y) + other * math.log(other / (1 - x - y)) for x, y in grid if x + y < 1
    )
    assert least_kl(p, q) == pytest.approx(least, rel=0.02)
    assert least_kl(0.3, 0.3) == 0


def test_habits_of_llamacpp(talking: Made) -> None:
    """A BOS and spaces before pieces of text are habits; anything else is a difference."""
    tokenizer = open_source(str(talking["mistral"][0])).tokenizer()
    inst, bos = tokenizer.convert_tokens_to_ids("[INST]"), tokenizer.bos_token_id
    plain, spaced = tokenizer.convert_tokens_to_ids(["a", "▁a"])
    eos, ends = tokenizer.eos_token_id, (bos, None)
    assert added_ends(tokenizer) == ends
    assert _habit(tokenizer, [inst, plain], [inst, plain], ends) == []
    assert _habit(tokenizer, [inst, plain], [bos, inst, plain], ends) == ["it adds a BOS"]
    assert _habit(tokenizer, [inst, plain], [bos, inst, plain], (None, None)) is None
    assert _habit(tokenizer, [inst, plain], [inst, plain, eos], (None, eos)) == ["it adds an EOS"]
    assert _habit(tokenizer, [inst, plain], [inst, plain, eos], ends) is None
    assert _habit(tokenizer, [inst, plain], [inst, spaced], ends) == ["it puts a space before each piece of text"]
    assert _habit(tokenizer, [inst, plain], [inst, plain, inst], ends) is None


def test_first_differences_are_shown() -> None:
    assert around("same", "same and more") == ("'same'", "'same and more'")
    left, right = around("x" * 100 + "left" + "y" * 100, "x" * 100 + "right")
    assert (left, right) == (f"... '{'x' * 40}left{'y' * 56}' ...", f"... '{'x' * 40}right'")
    assert around(["a", "b"], ["a", "c"]) == ("['a', 'b']", "['a', 'c']")


def test_a_template_without_an_end(talking: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = open_source(str(talking["gemma"][0])).tokenizer()
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(TimeoutError, match="more than 1 seconds"):
        render(tokenizer, Conversation("", ({"role": "user", "content": ""},)), True, chat_template=loop)


def test_a_file_whose_template_has_no_end_fails(talking: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is not even started: it would render the template for as long."""
    source, artifact, _ = talking["gemma"]
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    monkeypatch.setattr(llamacpp, "server_binary", None)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    result = talk_of(exported_anew(artifact, tmp_path, chat_template=loop), source, "llama.cpp")
    assert result.failed == ["A chat template does not come to an end: it took more than 1 seconds."]


def test_questions_that_the_template_refuses_are_left_out(talking: Made) -> None:
    """They ended `verify` with the exception of the template."""
    source = open_source(str(talking["gemma"][0]))
    tokenizer = source.tokenizer()
    assert len(prompts(tokenizer, source.config)) == 3
    tokenizer.chat_template = "{% if 'France' in messages[0].content %}{{ raise_exception('no') }}{% endif %}ok"
    assert [text for text in prompts(tokenizer, source.config) if "France" in text] == []
    assert len(prompts(tokenizer, source.config)) == 2


def test_a_folder_without_a_tokenizer_fails(talking: Made, tmp_path: Path) -> None:
    source, artifact, _ = talking["gemma"]
    shutil.copytree(artifact.folder, tmp_path / "artifact")
    for path in (tmp_path / "artifact/model").glob("*token*"):
        path.unlink()
    (sentence,) = talk_of(tmp_path / "artifact", source).failed
    assert "cannot be loaded" in sentence


def test_the_command_fails_and_shows_all(talking: Made, text: Path, tmp_path: Path) -> None:
    source, artifact, file = talking["chatml"]
    arguments = ["verify", "--against", str(source), "--text", str(text), "--windows", "1", "--engine", "llama.cpp"]
    page = tmp_path / "page.html"
    runner = CliRunner()
    right = runner.invoke(app, [*arguments, str(file), "--html", str(page)], env={"COLUMNS": "200"})
    assert right.exit_code == 0, right.output
    shown = " ".join(right.output.split())
    assert "renders 18 of 18 conversations alike" in shown
    assert "the source says" in shown
    assert "What llama.cpp's server printed" in page.read_text()
    wrong = exported_anew(artifact, tmp_path, chat_template=TWO_SPACES)
    failed = runner.invoke(app, [*arguments, str(wrong), "--json"])
    assert failed.exit_code == 1
    content = json.loads(failed.stdout)
    assert len(content["talk"]["continuations"]) == 3
    assert any("transformers renders 8 of 17" in sentence for sentence in content["failed"])


def test_nothing_that_a_terminal_obeys() -> None:
    said = Continuation("a\x1b", "\x1b[31mred\n", "b", 3, 0, "\x1b", "b")
    assert talk_report.one_line("\x1b[31mred\n") == "\\x1b[31mred\\n"
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(talk_report.continuation_table(Talk(continuations=[said])))
    assert "\x1b" not in console.export_text()
