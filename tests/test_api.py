"""The Python API and the examples that use it."""

from __future__ import annotations

import errno
import inspect
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import lqexport
from lqexport.converters.folders import native
from lqexport.storage.artifact import Artifact
from lqexport.storage.files import write_json
from lqexport.verification.publish import upload_list

SMALL: dict[str, Any] = {"method": "rtn", "samples": 2, "sequence_length": 32}


@pytest.fixture(scope="module")
def folder(rounded_artifact: Callable[..., Artifact], tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("api")
    native.write(rounded_artifact(base / "artifact", "native:table-3"), base / "folder")
    return base / "folder"


def test_every_name_is_there() -> None:
    for name in lqexport.__all__:
        assert getattr(lqexport, name) is not None
    assert set(lqexport.__all__) <= set(dir(lqexport))
    with pytest.raises(AttributeError, match="no 'nothing'"):
        _ = lqexport.nothing


def documented_names(page: str) -> set[str]:
    """Returns the names that docs/python.md has as `lqexport.name` anywhere, or as `name(...)` in its table."""
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    calls = {name for row in rows for name in re.findall(r"`(\w+)\(", row.split("|")[1])}
    return calls | set(re.findall(r"\blqexport\.(\w+)", page))


def test_every_documented_name_works(root: Path) -> None:
    page = (root / "docs" / "python.md").read_text(encoding="utf-8")
    names = documented_names(page)
    assert {"inspect", "quantize", "UserError"} <= names <= set(lqexport.__all__)
    # In a process of its own, in which no other test has imported a module of the same name.
    program = f"import lqexport\nfor name in {sorted(names)}: assert callable(getattr(lqexport, name)), name"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_documented_argument_exists(root: Path) -> None:
    page = (root / "docs" / "python.md").read_text(encoding="utf-8")
    calls = re.findall(r"`(\w+)\(([^`]*)\)`", page)
    assert len(calls) > 10
    for name, arguments in calls:
        parameters = inspect.signature(getattr(lqexport, name)).parameters
        assert {argument.strip().rstrip("=") for argument in arguments.split(",")} <= set(parameters), name


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: lqexport.make_imatrix("x", "y", samples=0), "samples must be at least 1, not 0"),
        (lambda: lqexport.write_text("x", "y", sequence_length=4), "sequence_length must be at least 8, not 4"),
        (lambda: lqexport.perplexity("x", windows=0), "windows must be at least 1, not 0"),
        (lambda: lqexport.zero_shot("x", shots=-1), "shots must be at least 0, not -1"),
        (lambda: lqexport.zero_shot("x", limit=0), "limit must be at least 1, not 0"),
        (lambda: lqexport.judge("x", "http://localhost", "y", tokens=0), "tokens must be at least 1, not 0"),
        (lambda: lqexport.Recipe("x", "gguf:Q4_0", dampening=math.nan), "dampening must be at least 0, not nan"),
        (lambda: lqexport.Recipe("x", "gguf:Q4_0", exponent=math.inf), "exponent must be at least 0, not inf"),
        (lambda: lqexport.Recipe("x", "gguf:Q4_0", tune_rate=-1.0), r"tune_rate must be at least 0, not -1\.0"),
        (lambda: lqexport.Recipe("x", "exl3", bits=math.nan), "bits must be at least 0, not nan"),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused_before_anything_is_opened(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(lqexport.UserError, match=f"^{sentence}"):
        call()


def test_a_file_that_cannot_be_read_is_named(
    folder: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, record, unbroken = tmp_path / "source", tmp_path / "record", Path.open
    shutil.copytree(tiny_model, source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    write_json(record / "verification.json", {"passed": True, "failed": [], "adapter": None, "files": {}})

    def broken(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.name in ("manifest.json", "chat_template.jinja") or self == folder / "config.json":
            raise OSError(errno.EIO, "Input/output error", str(self))
        return unbroken(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", broken)
    with pytest.raises(lqexport.UserError, match=r"manifest\.json: Input/output error"):
        lqexport.compare([folder.with_name("artifact")], str(tiny_model), text=__file__)
    with pytest.raises(lqexport.UserError, match=r"config\.json: Input/output error"):
        upload_list(folder, record=record)
    with pytest.raises(lqexport.UserError, match=r"chat_template\.jinja: Input/output error"):
        lqexport.preview(lqexport.Recipe(str(source), "native:table-3", method="rtn"), tmp_path / "out")


def test_a_gguf_from_python(tiny_model: Path, tmp_path: Path, text: Path) -> None:
    seen: list[tuple[str, float]] = []
    listener = lqexport.Callback(lambda stage, share: seen.append((stage, share)))
    recipe = lqexport.Recipe(str(tiny_model), "gguf:Q4_0", **SMALL)
    assert lqexport.preview(recipe, tmp_path / "out").tensors
    report = lqexport.quantize(recipe, str(tmp_path / "out"), listener=listener)
    assert report["bits_per_weight"] > 4
    file = lqexport.export(tmp_path / "out", str(tmp_path / "model.gguf"), listener=listener)
    result = lqexport.verify(str(file), str(tiny_model), text=str(text), windows=1, artifact=str(tmp_path / "out"))
    assert result.failed == []
    assert all(tensor.same_bytes for tensor in result.tensors)
    shares = [share for stage, share in seen if stage == "Quantizing"]
    assert shares[0] == 0
    assert shares[-1] == pytest.approx(1)
    assert shares == sorted(shares)
    with pytest.raises(lqexport.UserError, match="Unknown format 'onnx'"):
        lqexport.export(tmp_path / "out", tmp_path / "x", format="onnx")  # type: ignore[arg-type]
    with pytest.raises(lqexport.UserError, match="beside a GGUF file"):
        lqexport.export(tmp_path / "out", tmp_path / "x", format="native", adapter=tmp_path / "y")


def test_the_backward_pass_of_token_weights_shows_its_progress(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    recipe = lqexport.Recipe(
        str(tiny_model), "gguf:Q4_0", calibration=str(text), samples=4, sequence_length=32, moments="guided", tune=0
    )
    listener = lqexport.Callback(lambda stage, share: seen.append((stage, share)))
    lqexport.quantize(recipe, tmp_path / "out", listener=listener)
    shares = [share for stage, share in seen if stage == "Backward pass"]
    assert shares == [number / (len(shares) - 1) for number in range(len(shares))]
    assert len(shares) > 2


def test_results_are_shown_in_short(tiny_model: Path, folder: Path, text: Path, tmp_path: Path) -> None:
    """Nobody wants every number of every tensor on the screen for having left out a variable."""
    recipe = lqexport.Recipe(str(tiny_model), "gguf:F16", **SMALL)
    results = [
        lqexport.preview(recipe, tmp_path / "out"),
        lqexport.quantize(recipe, tmp_path / "out"),
        lqexport.forecast(tiny_model, recipe, gpu=None, host=None),
        lqexport.inspect(folder),
        lqexport.verify(folder, str(tiny_model), text=str(text), windows=1),
        lqexport.compare([folder], str(tiny_model), text=str(text), windows=1),
    ]
    lengths = {type(result).__name__: len(repr(result)) for result in results}
    assert max(lengths.values()) < 800, lengths
    assert "<20 entries>" in repr(results[0])
    assert json.loads(json.dumps(results[1])) == results[1]


def test_what_a_callback_raises_stops_the_work() -> None:
    def stop(stage: str, share: float) -> None:
        if share >= 0.5:
            raise InterruptedError

    messages: list[str] = []
    listener = lqexport.Callback(stop, messages.append)
    listener.stage("Work", 4)
    listener.advance(1)
    listener.message("half of it soon")
    with pytest.raises(InterruptedError):
        listener.advance(1)
    assert messages == ["half of it soon"]


def test_the_quantize_example(tiny_model: Path, tmp_path: Path, load_script: Callable[[str], ModuleType]) -> None:
    result = load_script("examples/quantize.py").run(str(tiny_model), tmp_path / "model", **SMALL)
    assert result.failed == []
    assert 0 < result.evaluations[0].kl < 1


def test_the_generate_example(folder: Path, load_script: Callable[[str], ModuleType]) -> None:
    written = load_script("examples/generate.py").run(folder, "def f(x):", tokens=3)
    assert written.startswith("def f(x):")
    assert len(written) > len("def f(x):")


def test_the_finetune_example(
    folder: Path, tmp_path: Path, text: Path, load_script: Callable[[str], ModuleType]
) -> None:
    losses = load_script("examples/finetune.py").run(folder, text.read_text()[:2000], tmp_path, steps=6, length=64)
    assert losses[-1] < losses[0]
    assert (tmp_path / "adapter_model.safetensors").is_file()
