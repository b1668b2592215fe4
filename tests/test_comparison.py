"""`lqexport compare`: the numbers of `verify` for several files, in one table and one plot."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from corrected_models import handmade
from typer.testing import CliRunner

from lqexport.cli.app import app
from lqexport.converters.folders import native
from lqexport.converters.gguf import adapter as gguf_adapter
from lqexport.converters.gguf import writer as gguf_writer
from lqexport.errors import UserError
from lqexport.models.inspect import inspect
from lqexport.models.source import open_source
from lqexport.runtime.progress import Callback
from lqexport.solver.rounded_tensor import round_tensor
from lqexport.storage.artifact import Artifact
from lqexport.verification import comparison, verifying
from lqexport.verification.comparison import compare
from lqexport.verification.verifying import verify

TARGETS = ("native:table-2", "native:affine-4-g64")


@pytest.fixture(scope="module")
def files(
    tiny_model: Path, rounded_artifact: Callable[..., Artifact], tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """An artifact of 2 bits, a native folder of 4 bits, and a .gguf file in F16."""
    base = tmp_path_factory.mktemp("compared")
    two, four = (rounded_artifact(base / f"artifact-{i}", target, rank=8 * i) for i, target in enumerate(TARGETS))
    native.write(four, base / "native")
    gguf_writer.write(rounded_artifact(base / "plain", "gguf:F16"), base / "plain.gguf")
    return [two.folder, base / "native", base / "plain.gguf"]


def test_the_numbers_are_those_of_verify(files: list[Path], tiny_model: Path, text: Path) -> None:
    result = compare(files, str(tiny_model), text=str(text), windows=2)
    for file, compared in zip(files, result.files, strict=True):
        alone = verify(file, str(tiny_model), text=str(text), windows=2)
        assert compared.evaluation == alone.evaluations[0]
        assert (compared.nbytes, compared.bits_per_weight) == (alone.nbytes, alone.bits_per_weight)
        assert compared.linears_bits_per_weight == alone.linears_bits_per_weight
        listed = inspect(file).as_json()
        assert (listed["weights"], listed["bits_per_weight"]) == (alone.weights, alone.bits_per_weight)
        assert compared.sha256 == alone.sha256
        assert compared.tokens_per_second > 0
    divergences = [compared.evaluation.kl for compared in result.files]
    assert divergences == sorted(divergences, reverse=True)
    assert divergences[2] < 1e-6


def test_a_file_is_measured_without_its_adapter_and_with_it(
    tiny_model: Path, rounded_artifact: Callable[..., Artifact], text: Path, tmp_path: Path
) -> None:
    artifact = rounded_artifact(tmp_path / "artifact", "gguf:Q4_0", 32)
    gguf_writer.write(artifact, tmp_path / "m.gguf")
    gguf_adapter.write(artifact, tmp_path / "a.gguf")
    (tmp_path / "other.gguf").write_bytes((tmp_path / "m.gguf").read_bytes())
    files = [tmp_path / "m.gguf", tmp_path / "other.gguf"]
    options: dict[str, Any] = {"text": str(text), "windows": 1}
    result = compare(files, str(tiny_model), adapters=[tmp_path / "a.gguf"], **options)
    without, corrected, other = result.files
    assert [each.adapter for each in result.files] == [None, str(tmp_path / "a.gguf"), None]
    alone = verify(files[0], str(tiny_model), adapter=tmp_path / "a.gguf", max_over_expected=None, **options)
    assert without.evaluation == other.evaluation == alone.base_evaluations[0]
    assert corrected.evaluation == alone.evaluations[0] != without.evaluation
    assert (corrected.nbytes, corrected.bits_per_weight) == (alone.nbytes, alone.bits_per_weight)
    assert corrected.linears_bits_per_weight == alone.linears_bits_per_weight > without.linears_bits_per_weight
    comparison.save_plot(result, tmp_path / "plot.svg")
    assert "m.gguf + a.gguf, " in (tmp_path / "plot.svg").read_text()


def test_adapters_that_do_not_fit_are_refused_before_anything_runs(
    files: list[Path], smaller_model: Path, tiny_model: Path, text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(comparison, "BlockModel", lambda *_: pytest.fail("ran"))
    gguf_adapter.write(handmade(smaller_model, tmp_path / "artifact", 0.05), tmp_path / "a.gguf")
    arguments = ["compare", str(files[2]), "--against", str(tiny_model), "--text", str(text), "--windows", "1"]
    for adapters, said in (
        (["a.gguf"], "a.gguf does not fit"),
        (["a.gguf", "a.gguf"], "more adapters (2) than files (1)"),
        (["none.gguf"], "There is no file or folder"),
    ):
        options = [part for name in adapters for part in ("--adapter", str(tmp_path / name))]
        shown = CliRunner().invoke(app, [*arguments, *options])
        assert (shown.exit_code, said in shown.stderr) == (2, True), shown.output


@pytest.mark.llamacpp
def test_in_llamacpp(files: list[Path], tiny_model: Path, text: Path) -> None:
    result = compare([files[2]], str(tiny_model), text=str(text), windows=1, engine="llama.cpp")
    assert result.files[0].evaluation.kl < 1e-4
    assert result.files[0].tokens_per_second > 0
    with pytest.raises(UserError, match=r"llama.cpp runs .gguf files"):
        compare(files, str(tiny_model), text=str(text), engine="llama.cpp")


def test_the_command(
    files: list[Path], tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = Path(os.path.commonpath(files))
    monkeypatch.chdir(top)  # a long path would be folded in the table
    names = [str(file.relative_to(top)) for file in files]
    arguments = ["compare", *names, "--against", str(tiny_model), "--text", str(text), "--windows", "1"]
    shown = CliRunner().invoke(app, [*arguments, "--plot", str(tmp_path / "plot.svg")])
    assert shown.exit_code == 0, shown.output
    for part in ("native", "plain.gguf", "(source)", "tokens/s"):
        assert part in shown.stdout
    drawn = (tmp_path / "plot.svg").read_text()
    assert drawn.startswith("<svg")
    assert "plain.gguf, " in drawn
    as_json = CliRunner().invoke(app, [*arguments, "--json"])
    content = json.loads(as_json.stdout)
    assert [entry["file"] for entry in content["files"]] == names
    assert content["files"][0]["evaluation"]["kl"] > content["files"][1]["evaluation"]["kl"]


@pytest.mark.parametrize("content", ["", "too short"])
def test_a_short_text_is_said_before_any_work(
    content: str, files: list[Path], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digests of all files were read before, which takes minutes for large ones."""
    (tmp_path / "short.txt").write_text(content)
    monkeypatch.setattr(verifying, "_digest_of", lambda _: pytest.fail("a file was read"))
    with pytest.raises(UserError, match=r"one window of llama\.cpp-512 needs 512"):
        compare(files, str(tiny_model), text=str(tmp_path / "short.txt"))


def test_another_vocabulary_is_told(files: list[Path], tiny_model: Path, text: Path, tmp_path: Path) -> None:
    """The tensors have the source's shapes, so the file runs, but its tokens mean something else."""
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    said: list[str] = []
    compare(files[2:], str(other), text=str(text), windows=1, listener=Callback(lambda *_: None, said.append))
    assert [sentence for sentence in said if "plain.gguf: Vocabulary: 2 tokens have other texts" in sentence]


def test_another_model_is_refused_before_anything_runs(
    files: list[Path], tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "BlockModel", lambda *_: pytest.fail("ran"))
    artifact = Artifact(tmp_path / "other")
    artifact.begin({"recipe": {"target": "gguf:F16"}})
    source = open_source(str(tiny_model))
    source.copy_model_files(artifact.model_folder)
    artifact.write(round_tensor("model.norm.weight", source.read("model.norm.weight")[:7].float(), "gguf:F32"))
    artifact.finish(["model.norm.weight"], {"tensors": []})
    with pytest.raises(UserError, match=r"is not a model like .* tensors are missing"):
        compare([files[0], artifact.folder], str(tiny_model), text=str(text))
    with pytest.raises(UserError, match="at least one file"):
        compare([], str(tiny_model))
