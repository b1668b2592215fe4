"""EXL3 from `quantize` to a verified folder, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lqexport.converters.exl3 import writer
from lqexport.converters.exl3.reader import Exl3Model
from lqexport.models.modules import expected_shapes
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.storage.artifact import Artifact, decoded
from lqexport.verification.verifying import verify


@pytest.fixture(scope="module")
def artifact(smaller_model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("exl3") / "artifact"
    options = {
        "calibration": str(text),
        "samples": 4,
        "sequence_length": 64,
        "descent": 1,
        "tune": 10,
        "tune_rate": 0.03,
    }
    quantize(Recipe(str(smaller_model), "exl3", bits=2.5, head_bits=4, **options), folder)
    return Artifact(folder)


def test_every_linear_is_solved_in_the_chosen_width(artifact: Artifact) -> None:
    planned = artifact.manifest()
    linears = {name: artifact.read(name) for name, entry in planned.items() if entry["codec"].startswith("exl3:")}
    assert len(linears) == 7 * 2 + 1
    bits = {name: float(tensor.codec_name.removeprefix("exl3:")) for name, tensor in linears.items()}
    assert bits.pop("lm_head.weight") == 4
    assert len(set(bits.values())) > 1
    tuning = json.loads((artifact.folder / "report.json").read_text())["tuning"]
    assert tuning["kept"]
    for name, tensor in linears.items():
        assert tensor.facts.get("tuned", False) == (name != "lm_head.weight")
        assert tensor.facts["weight_error"] < 2 * 4 ** -float(tensor.codec_name.removeprefix("exl3:")), name
        assert tensor.facts["relative_error"] < tensor.facts["weight_error"]
        assert ("asymmetric_strength" in tensor.facts) == (name != "lm_head.weight")


def test_the_folder_holds_what_was_solved(artifact: Artifact, smaller_model: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    writer.write(artifact, folder)
    model, name = Exl3Model(folder, expected_shapes), "model.layers.1.mlp.down_proj.weight"
    assert np.array_equal(model.read(name), decoded(artifact.read(name)))
    result = verify(folder, str(smaller_model), text=str(text), windows=1, artifact=artifact.folder)
    assert result.failed == []
