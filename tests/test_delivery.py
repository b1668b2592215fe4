"""`lqexport export`: from a model to a verified file in one command."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import lqexport
from lqexport.cli.app import app
from lqexport.delivery import deliver
from lqexport.delivery.places import Places, named_type, target_of
from lqexport.delivery.request import Request
from lqexport.delivery.summary import duration
from lqexport.storage.files import file_digest
from lqexport.verification import report
from lqexport.verification.publish import upload_list

SMALL: dict[str, Any] = {"samples": 2, "sequence_length": 32, "tune": 0, "method": "gptq"}


def run(*arguments: object, status: int = 0) -> Any:
    """Runs `lqexport export` in this process and checks its exit status."""
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    assert result.exit_code == status, result.output + result.stderr
    return result


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in an empty folder, and draws no plots, which take longer than the rest."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "plots", lambda result: [])


@pytest.fixture(scope="module")
def short_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of a few windows of the small models."""
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 40)
    return path


@pytest.fixture(scope="module")
def options(text: Path, short_text: Path) -> list[object]:
    """Options of a short export."""
    recipe = [part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", value)]
    return [*recipe, "--calibration", text, "--text", short_text, "--windows", 1, "--device", "cpu"]


@pytest.fixture(scope="module")
def arguments(text: Path, smaller_model: Path, short_text: Path) -> dict[str, Any]:
    """The arguments of a small `export_model`."""
    recipe = lqexport.Recipe(str(smaller_model), "gguf:Q4_0", calibration=str(text), **SMALL)
    return {"model": recipe, "text": str(short_text), "windows": 1, "engine": "lqexport", "device": "cpu"}


def names(folder: str = ".") -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


@pytest.mark.llamacpp
def test_one_command_writes_a_verified_file(smaller_model: Path, options: list[object]) -> None:
    shown = run(smaller_model, "tiny-Q4_0.gguf", *options).stdout
    assert names() == {"tiny-Q4_0.gguf", "tiny-Q4_0.gguf.record"}
    assert names("tiny-Q4_0.gguf.record") == {"README.md", "report.html", "verification.json"}
    for part in ("bits per weight", "KL divergence", "perplexity", "same top token", "quantize", "in llama.cpp",
                 "result: passed", "llama-server -m tiny-Q4_0.gguf", "push-to-hub tiny-Q4_0.gguf"):  # fmt: skip
        assert part in shown
    assert "tiny-Q4_0.gguf" in upload_list("tiny-Q4_0.gguf", record="tiny-Q4_0.gguf.record")
    assert "exists" in run(smaller_model, "tiny-Q4_0.gguf", *options, status=2).stderr


@pytest.mark.parametrize("stage", ["Quantizing", "Write", "Run the source"])
def test_a_stopped_export_goes_on_and_ends_in_the_same_bytes(
    stage: str, arguments: dict[str, Any], whole: Path
) -> None:
    def stop(now: str, share: float) -> None:
        if now.startswith(stage) and share > 0.4:
            raise StopIteration(now)

    with pytest.raises(StopIteration):
        lqexport.export_model(path="tiny.gguf", listener=lqexport.Callback(stop), **arguments)
    assert names() == {"tiny.gguf.work"}
    assert lqexport.export_model(path="tiny.gguf", **arguments).passed
    assert names() == {"tiny.gguf", "tiny.gguf.record"}
    assert file_digest(Path("tiny.gguf")) == file_digest(whole)


@pytest.fixture(scope="module")
def whole(arguments: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an export that was never stopped."""
    path = tmp_path_factory.mktemp("whole") / "whole.gguf"
    lqexport.export_model(path=path, **arguments)
    return path


def test_a_failed_file_has_a_name_that_says_so(smaller_model: Path, options: list[object]) -> None:
    common = (smaller_model, "tiny-Q4_0.gguf", *options, "--engine", "lqexport")
    shown = run(*common, "--max-kl", 1e-12, status=1).stdout
    assert names() == {"tiny-Q4_0.failed.gguf", "tiny-Q4_0.failed.gguf.record", "tiny-Q4_0.gguf.work"}
    assert "above the limit of 1e-12" in shown
    assert "push-to-hub" not in shown
    with pytest.raises(lqexport.UserError, match="failed its verification"):
        upload_list("tiny-Q4_0.failed.gguf", record="tiny-Q4_0.failed.gguf.record")
    again = run(*common, "--json")
    assert "Quantizing" not in again.stderr
    assert json.loads(again.stdout)["passed"]
    assert names() == {"tiny-Q4_0.gguf", "tiny-Q4_0.gguf.record"}


def test_a_folder_with_low_rank_corrections(smaller_model: Path, options: list[object]) -> None:
    common = (*options, "--target", "gptq:4-g32", "--rank", 2, "--keep-artifact", "--json")
    told = json.loads(run(smaller_model, "tiny-gptq", *common).stdout)
    assert names() == {"tiny-gptq", "tiny-gptq-adapter", "tiny-gptq.record", "tiny-gptq.work"}
    assert (told["path"], told["adapter"], told["artifact"]) == (
        "tiny-gptq", "tiny-gptq-adapter", "tiny-gptq.work/artifact",
    )  # fmt: skip
    assert set(told["seconds"]) == {"quantize", "write", "verify"}
    assert told["verification"]["adapter"] == "tiny-gptq-adapter"
    listed = upload_list("tiny-gptq", record="tiny-gptq.record")
    assert {"config.json", "tiny-gptq-adapter/adapter_config.json", "README.md"} <= set(listed)
    shutil.rmtree("tiny-gptq-adapter")
    with pytest.raises(lqexport.UserError, match="tiny-gptq-adapter that the record names is not beside tiny-gptq"):
        upload_list("tiny-gptq", record="tiny-gptq.record")


def test_a_file_that_another_export_has_finished_meanwhile_stays(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path("tiny-Q4_0.gguf")
    monkeypatch.setattr(Request, "check_text", lambda self: file.write_bytes(b"another's"))
    with pytest.raises(lqexport.UserError, match="exists"):
        lqexport.export_model(path=file, **arguments)
    assert names() == {file.name}
    assert file.read_bytes() == b"another's"


@pytest.mark.parametrize("target", ["gguf:Q4_0", "native:table-3"])
def test_no_path_of_this_machine_is_published(target: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    """The source, the texts and the output have absolute paths here, all of them below pytest's folder."""
    recipe = dataclasses.replace(arguments["model"], target=target, rank=2)
    path = tmp_path / ("tiny.gguf" if target.startswith("gguf") else "tiny")
    done = lqexport.export_model(path=path, **arguments | {"model": recipe, "max_kl": 1e-12})
    assert not done.passed  # so that its record has sentences about the file, too
    places = [place for place in (done.path, done.record, done.adapter) if place]
    files = [entry for place in places for entry in (place, *place.rglob("*")) if entry.is_file()]
    assert len(files) > 3
    assert [entry for entry in files if b"pytest-of" in entry.read_bytes()] == []


def test_dry_run_shows_everything_and_writes_nothing(smaller_model: Path) -> None:
    shown = run(smaller_model, "tiny-Q4_0.gguf", "--dry-run", "--engine", "lqexport").stdout
    for part in ("gguf:Q4_0", "Time on", "Disk: needs", "16 windows of python-heldout", "lqexport"):
        assert part in shown
    assert json.loads(run(smaller_model, "tiny.gguf", "--target", "Q5_0", "--dry-run", "--json").stdout)["tensors"]
    assert names() == set()


@pytest.mark.parametrize(
    ("file", "options", "sentence"),
    [
        ("tiny.gguf", (), "does not say which type"),
        ("tiny", (), "does not say which type"),
        ("tiny-Q4_0.gguf", ("--size", "4bpw"), "says Q4_0, and --size"),
        ("tiny", ("--target", "gguf:Q4_0"), "ends with .gguf"),
        ("tiny-Q4_0.gguf", ("--target", "native:table-3"), "written as a folder"),
        ("tiny", ("--target", "native:table-3", "--engine", "llama.cpp"), "llama.cpp runs GGUF files"),
        ("tiny-Q4_0.gguf", ("--engine", "vllm"), "Unknown engine"),
        ("tiny-Q4_0.gguf", ("--text", "none.txt"), "There is no text file none.txt"),
        ("tiny-Q4_0.gguf", ("--text", "few.txt"), "Give a longer text"),
        ("tiny-Q4_0.gguf", ("--calibration", "none.txt"), "There is no text file none.txt"),
        ("tiny-Q4_0.gguf", ("--min-cosine", "0.9"), "min_cosine is for encoders"),
        ("tiny-Q4_0.gguf", ("--max-kl", "-1"), "max_kl cannot be -1: no file keeps that limit"),
        ("taken-Q4_0.gguf", (), "taken-Q4_0.gguf exists"),
        (f"{'é' * 116}-Q4_0.gguf", (), ".failed.gguf.record has 256 bytes"),
        ("\udcff-Q4_0.gguf", (), "is not UTF-8"),
        ("recorded-Q4_0.gguf", (), "recorded-Q4_0.gguf.record exists without"),
        ("other-Q4_0.gguf", (), "no work of an export"),
        ("few.txt/tiny-Q4_0.gguf", (), "cannot be written"),
    ],
)
def test_what_can_be_known_is_said_before_work(
    file: str, options: tuple[str, ...], sentence: str, smaller_model: Path
) -> None:
    Path("few.txt").write_text("Too short.")
    Path("taken-Q4_0.gguf").touch()
    for folder in ("recorded-Q4_0.gguf.record", "other-Q4_0.gguf.work"):
        Path(folder).mkdir()
        Path(folder, "file").touch()
    before = names()
    said = run(smaller_model, file, *options, status=2).stderr
    assert sentence in said
    assert said.count("error: ") == 1
    assert said.splitlines()[-1].startswith("error: ")
    assert names() == before


def test_disk_and_folder_are_checked_before_work(smaller_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Artifact and file lie beside each other until the file is verified, so the disk must hold both."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        assert "cannot be written" in run(smaller_model, "tiny-Q4_0.gguf", status=2).stderr
    needed = sum(tensor.nbytes for tensor in lqexport.preview(lqexport.Recipe(str(smaller_model), "Q4_0"), "x").tensors)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**25 + 2 * needed - 1}))
    assert "GB free" in run(smaller_model, "tiny-Q4_0.gguf", "--dry-run", status=2).stderr
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**25 + 2 * needed}))
    run(smaller_model, "tiny-Q4_0.gguf", "--dry-run", "--engine", "lqexport")


def test_a_source_that_changes_meanwhile_fails_the_file(
    smaller_model: Path, options: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record would name a source that the file is not made from."""
    source, quantized = Path(shutil.copytree(smaller_model, "model")), deliver.quantize

    def quantize(*given: Any, **others: Any) -> dict[str, Any]:
        report = quantized(*given, **others)
        os.utime(source / "model.safetensors", (0, 0))
        return report

    monkeypatch.setattr(deliver, "quantize", quantize)
    run("model", "tiny-Q8_0.gguf", *options, "--method", "rtn", "--engine", "lqexport", status=1)
    (failed,) = json.loads(Path("tiny-Q8_0.failed.gguf.record", "verification.json").read_text())["failed"]
    assert failed.startswith("model has changed since it was quantized.")


@pytest.mark.parametrize(
    ("name", "type_name"),
    [
        ("model-Q4_K_M.gguf", "Q4_K_M"), ("Model-IQ4_XS.gguf", "IQ4_XS"), ("Model.q4km.GGUF", "Q4_K_M"),
        ("m-f16.gguf", "F16"), ("Q8_0.gguf", "Q8_0"), ("model.gguf", None), ("m-auto.gguf", None),
        ("m-Q4_K_XL.gguf", None), ("Q4_K_M-model.gguf", None), ("model-Q4_K_M", None),
    ],
)  # fmt: skip
def test_the_type_in_a_name(name: str, type_name: str | None) -> None:
    assert named_type(Path(name)) == type_name


def test_the_target_where_none_is_given() -> None:
    assert target_of(Path("m-Q4_K_M.gguf")) == "gguf:Q4_K_M"
    assert target_of(Path("m.gguf"), size="4bpw") == "gguf:auto"
    assert target_of(Path("m"), bits=3.5) == "exl2"


def test_names_are_made_from_the_models() -> None:
    file, folder = Places(Path("a/m-1.5-Q4_0.gguf")), Places(Path("a/Llama-3.2-1B"))
    assert str(file.adapter) == "a/m-1.5-Q4_0-adapter.gguf"
    assert str(file.record) == "a/m-1.5-Q4_0.gguf.record"
    assert str(file.failed.record) == "a/m-1.5-Q4_0.failed.gguf.record"
    assert str(folder.failed.model) == "a/Llama-3.2-1B.failed"
    assert str(folder.within_work(folder).adapter) == "a/Llama-3.2-1B.work/Llama-3.2-1B-adapter"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.9, "60 s"), (185, "3 min 5 s"), (7800, "2 h 10 min")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def rows(text: str) -> int:
    """The number of options that a help shows."""
    return sum(line.startswith("│ --") for line in text.splitlines())


def test_help_is_short_and_help_all_is_not() -> None:
    for command in ("export", "quantize"):
        short, everything = (
            CliRunner().invoke(app, [command, flag], env={"COLUMNS": "120"}).output for flag in ("--help", "--help-all")
        )
        assert rows(short) < 25
        assert "--target" in short
        assert "--dampening" not in short
        assert "--dampening" in everything
        assert rows(everything) > 38


@pytest.mark.llamacpp
def test_export_and_check_in_a_bare_environment(smaller_model: Path, options: list[object], tmp_path: Path) -> None:
    """No home, no folder for temporary files, ASCII, no network, and 48 open files."""
    bare = {"HOME": "/dev/null/home", "TMPDIR": str(tmp_path / "nowhere"), "LC_ALL": "C", "PYTHONUTF8": "0"}
    bare |= {"PYTHONIOENCODING": "ascii", "HF_HUB_OFFLINE": "1"}
    limited = ["sh", "-c", 'ulimit -n 48 && exec "$@"', "sh", sys.executable, "-m", "lqexport"]
    for arguments in (["export", smaller_model, "tiny-Q4_0.gguf", *options], ["check", "tiny-Q4_0.gguf"]):
        command = [*limited, *map(str, arguments)]
        done = subprocess.run(command, env=os.environ | bare, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    assert names() == {"tiny-Q4_0.gguf", "tiny-Q4_0.gguf.record"}


def test_a_disk_that_is_full_when_the_record_is_written(
    arguments: dict[str, Any], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "card.md")

    with monkeypatch.context() as patch:
        patch.setattr("lqexport.delivery.deliver.save_record", full)
        with pytest.raises(lqexport.UserError, match="No space left on device"):
            lqexport.export_model(path="tiny.gguf", **arguments)
    assert names() == {"tiny.gguf.work"}
    assert lqexport.export_model(path="tiny.gguf", **arguments).passed
    assert names() == {"tiny.gguf", "tiny.gguf.record"}
    assert Path("tiny.gguf").read_bytes() == whole.read_bytes()


KILLED_AS_IT_VERIFIES = """
import os, pickle, signal, sys
import lqexport

def kill(stage, share):
    if stage.startswith("Run the source"):
        os.kill(os.getpid(), signal.SIGKILL)

lqexport.export_model(path="tiny.gguf", listener=lqexport.Callback(kill), **pickle.load(sys.stdin.buffer))
"""


def test_an_export_killed_as_it_verifies_goes_on(arguments: dict[str, Any], whole: Path) -> None:
    command = [sys.executable, "-c", KILLED_AS_IT_VERIFIES]
    killed = subprocess.run(command, input=pickle.dumps(arguments), capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert names() == {"tiny.gguf.work"}
    assert (Path("tiny.gguf.work") / "tiny.gguf").exists()
    assert lqexport.export_model(path="tiny.gguf", **arguments).passed
    assert names() == {"tiny.gguf", "tiny.gguf.record"}
    assert Path("tiny.gguf").read_bytes() == whole.read_bytes()
