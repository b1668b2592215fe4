"""An artifact in which any byte of any file has changed is reported as damaged, finished or not."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import pytest

from lqexport.errors import UserError
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.runtime.progress import Callback
from lqexport.storage.artifact import Artifact

TRIES = 60
"""How many changed bytes are tried for each pattern of files."""


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("damage") / "artifact"
    quantize(Recipe(str(tiny_model), "gguf:Q4_0", method="rtn"), folder)
    return Artifact(folder)


def damaged_files(artifact: Artifact) -> list[str]:
    """Returns the names of files that are reported as damaged, or the error's sentence."""
    try:
        return artifact.damaged()
    except UserError as error:
        return [str(error)]


def test_a_whole_artifact_is_whole(finished: Artifact) -> None:
    assert finished.damaged() == []
    listed = {path.relative_to(finished.folder).as_posix() for path in finished.folder.rglob("*") if path.is_file()}
    # The manifest has the digest of every file that a run writes, except the manifest itself and the log.
    digests = json.loads((finished.folder / "manifest.json").read_text())["files"]
    assert listed - digests.keys() == {"manifest.json", "log.jsonl"}


def test_hidden_files_are_not_the_artifacts(finished: Artifact, tmp_path: Path) -> None:
    artifact = Artifact(shutil.copytree(finished.folder, tmp_path / "artifact"))
    (artifact.model_folder / ".DS_Store").touch()
    assert {path.name for path in artifact.model_files()} == {path.name for path in finished.model_files()}
    artifact.finish(list(artifact.manifest()), artifact.report())
    assert (artifact.folder / "manifest.json").read_bytes() == (finished.folder / "manifest.json").read_bytes()


@pytest.mark.parametrize("pattern", ["manifest.json", "run.json", "report.json", "model/*.json", "tensors/*norm*"])
def test_any_changed_byte_is_found(finished: Artifact, tmp_path: Path, pattern: str) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(finished.folder, folder)
    draw, paths = random.Random(pattern), sorted(folder.glob(pattern))
    for _ in range(TRIES):
        path = draw.choice(paths)
        content = path.read_bytes()
        changed = bytearray(content)
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        (name,) = damaged_files(Artifact(folder))
        assert path.name in name
        path.write_bytes(content)
    path.unlink()
    assert damaged_files(Artifact(folder))


def test_a_tensor_cannot_be_named_out_of_the_folder(finished: Artifact) -> None:
    with pytest.raises(UserError, match="cannot be the name of a tensor"):
        finished.read("../model/config")


def stop(stage: str, share: float) -> None:
    if stage == "Tuning end to end" and share > 0.6:
        raise KeyboardInterrupt


def test_any_changed_byte_of_what_a_stopped_run_left_is_found(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    few = {"samples": 2, "sequence_length": 16, "descent": 0, "tune": 8}
    recipe = Recipe(str(tiny_model), "gguf:auto", size="5bpw", calibration=str(text), **few)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        quantize(recipe, tmp_path / "out", listener=Callback(stop))
    draw, artifact = random.Random(0), Artifact(tmp_path / "out")
    artifact.check_written()
    for pattern in ("tensors/*", "work/*.safetensors", "work/moments/*/*.safetensors"):
        for _ in range(10):
            path = draw.choice(sorted(artifact.folder.glob(pattern)))
            content = path.read_bytes()
            changed = bytearray(content)
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
            path.write_bytes(changed)
            with pytest.raises(UserError, match=re.escape(f"{path} is not as it was written")):
                artifact.check_written()
            path.write_bytes(content)
    path.write_bytes(changed)
    with pytest.raises(UserError, match="is not as it was written"):
        quantize(recipe, artifact.folder)
