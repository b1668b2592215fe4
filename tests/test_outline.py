"""llama.cpp loads the GGUF file of a plan before any work, without a byte of its tensors."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from planned_files import said_before_work

from lqexport.converters.gguf import writer as gguf_writer
from lqexport.converters.gguf.file import FileContent
from lqexport.errors import UserError
from lqexport.evaluation import llamacpp, outline
from lqexport.evaluation.llamacpp import LlamaCpp
from lqexport.exporting import export
from lqexport.models.source import HuggingFaceSource
from lqexport.pipeline.quantize import quantize
from lqexport.planning.dryrun import preview
from lqexport.planning.forecast import ConfigModel
from lqexport.planning.planned_artifact import PlannedArtifact
from lqexport.planning.recipe_plan import plan_recipe
from lqexport.recipe import Recipe
from lqexport.storage.files import write_json

EPSILON = "llama.attention.layer_norm_rms_epsilon"
KEY_MISSING = rf"llama\.cpp says: .*key not found in model: {EPSILON}"


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[dict[str, Any]], None]], None]:
    """A function that lets every GGUF file be written with other metadata of the model."""
    add_model = gguf_writer.add_model

    def spoil(change: Callable[[dict[str, Any]], None]) -> None:
        def changed(writer: Any, *arguments: Any) -> None:
            add_model(writer, *arguments)
            change(writer.kv_data[0])

        monkeypatch.setattr(gguf_writer, "add_model", changed)

    return spoil


@pytest.mark.llamacpp
def test_a_file_without_a_needed_key_is_refused_before_work(
    smaller_model: Path, tmp_path: Path, spoiled: Callable[..., None]
) -> None:
    recipe = Recipe(str(smaller_model), "gguf:F16")
    quantize(recipe, tmp_path / "finished")
    assert export(tmp_path / "finished", tmp_path / "good.gguf").is_file()
    spoiled(lambda metadata: metadata.pop(EPSILON))
    with pytest.raises(UserError, match=KEY_MISSING) as refused:
        quantize(recipe, tmp_path / "out")
    assert "Choose another target" in str(refused.value)
    assert tempfile.gettempdir() not in str(refused.value)
    with pytest.raises(UserError, match=KEY_MISSING):
        preview(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=KEY_MISSING):
        export(tmp_path / "finished", tmp_path / "bad.gguf")
    assert not (tmp_path / "bad.gguf").exists()


@pytest.mark.llamacpp
def test_a_file_on_which_llamacpp_aborts_is_refused(smaller_model: Path, spoiled: Callable[..., None]) -> None:
    def without_blocks(metadata: dict[str, Any]) -> None:
        metadata["llama.block_count"].value = 0

    spoiled(without_blocks)
    with pytest.raises(UserError, match=r"ended with SIGABRT when it loaded the GGUF file .*GGML_ASSERT"):
        said_before_work(HuggingFaceSource(smaller_model, "model"))


@pytest.fixture
def large(tmp_path: Path) -> FileContent:
    """The content of a file of 5 GB: that of Llama 3.1 8B in Q4_K_M, without a tokenizer."""
    model = ConfigModel(json.loads((Path(__file__).parent / "configs" / "llama-3.1-8b.json").read_text()))
    recipe = Recipe("llama", "gguf:Q4_K_M")
    write_json(tmp_path / "model" / "config.json", model.config)
    artifact = PlannedArtifact(model, recipe, plan_recipe(model, recipe), tmp_path)  # type: ignore[arg-type]
    return gguf_writer.content_of(artifact, with_tokenizer=False)


@pytest.mark.llamacpp
def test_no_byte_of_a_tensor_is_written_read_or_kept(large: FileContent, tmp_path: Path) -> None:
    def facts() -> tuple[int, int]:
        """Bytes that this process has read, and pages of memory that it has."""
        (line, *_) = Path("/proc/self/io").read_text().splitlines()
        return int(line.split()[1]), int(Path("/proc/self/statm").read_text().split()[1])

    path = tmp_path / "outline.gguf"
    outline._write_outline(path, large.header(), large.nbytes)
    assert path.stat().st_size > 4.9e9
    assert path.stat().st_blocks * 512 < 1 << 20
    before = facts()
    with LlamaCpp(path, 32, threads=1, part="outline"):
        after = facts()
    assert after[0] - before[0] < 4 << 20
    assert (after[1] - before[1]) * os.sysconf("SC_PAGESIZE") < 256 << 20


@pytest.mark.llamacpp
def test_without_holes_only_the_vocabulary_is_loaded(
    smaller_model: Path, tmp_path: Path, spoiled: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(lambda metadata: metadata.pop(EPSILON))
    monkeypatch.setattr(outline, "PROBE", 1 << 10)
    monkeypatch.setattr(outline, "os", SimpleNamespace(fstat=lambda _: SimpleNamespace(st_blocks=1 << 20)))
    (sentence,) = said_before_work(HuggingFaceSource(smaller_model, "model"))
    assert sentence.startswith("Whether llama.cpp loads the file was not checked before work, since the file system of")
    with pytest.raises(outline.NoHoles, match="cannot hold a file of that size"):
        outline._write_outline(tmp_path / "absent" / "model.gguf", b"", 1)


@pytest.mark.parametrize("installed", [False, True])
def test_without_a_llamacpp_that_can_be_used_nothing_is_loaded(
    smaller_model: Path, spoiled: Callable[..., None], monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    def of_another_version(*_: Any, **__: Any) -> None:
        raise UserError("llama.cpp cannot be used here.")

    spoiled(lambda metadata: metadata.pop(EPSILON))
    monkeypatch.setattr(llamacpp, "is_installed", lambda: installed)
    monkeypatch.setattr(outline, "LlamaCppProcess", of_another_version)
    assert said_before_work(HuggingFaceSource(smaller_model, "model")) == []
