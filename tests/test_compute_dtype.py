"""The dtype of a run's passes: chosen by what the machine multiplies fastest, and kept by a resumed run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lqexport.pipeline.quantize import quantize
from lqexport.planning import compute_dtype
from lqexport.planning.compute_dtype import with_compute_dtype
from lqexport.planning.cost import Work
from lqexport.planning.dryrun import preview
from lqexport.recipe import Recipe
from lqexport.runtime.progress import Callback
from lqexport.storage.artifact import Artifact, StoredTensor


@pytest.fixture
def recipe(tiny_model: Path, text: Path) -> Recipe:
    return Recipe(str(tiny_model), "gguf:Q4_0", calibration=str(text), samples=4, sequence_length=32, smooth=False)


@pytest.fixture
def work(recipe: Recipe, tmp_path: Path) -> Work:
    return preview(recipe, tmp_path / "out").work


def machine(patch: pytest.MonkeyPatch, ratio: float, least: float = 0.0) -> None:
    """Makes a machine that multiplies bfloat16 `ratio` times as fast as float32."""
    patch.setattr(compute_dtype, "bfloat16_ratio", lambda: ratio)
    patch.setattr(compute_dtype, "LEAST_OPERATIONS", least)


def test_the_faster_dtype_is_chosen(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 4.1)
    chosen, sentence = with_compute_dtype(work, "cpu", None)
    assert chosen == replace(work.recipe, compute_dtype="bfloat16")
    assert sentence == "Passes multiply in bfloat16, which this CPU does 4.1 times as fast as float32."
    tuned = replace(work, recipe=replace(work.recipe, tune=2))
    assert with_compute_dtype(tuned, "cpu", None)[0].compute_dtype == "bfloat16"
    for device_type, ratio in (("cuda", 4.1), ("cpu", 1.9)):
        machine(monkeypatch, ratio)
        assert with_compute_dtype(work, device_type, None) == (work.recipe, "")
    machine(monkeypatch, 4.1, least=1e12)
    assert with_compute_dtype(work, "cpu", None) == (work.recipe, "")


def test_a_given_dtype_is_taken(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        dtype: replace(work, recipe=replace(work.recipe, compute_dtype=dtype)) for dtype in ("float32", "bfloat16")
    }
    for ratio in (4.1, 0.015):
        machine(monkeypatch, ratio)
        assert with_compute_dtype(given["float32"], "cpu", None) == (given["float32"].recipe, "")
    chosen, sentence = with_compute_dtype(given["bfloat16"], "cpu", None)
    assert chosen.compute_dtype == "bfloat16"
    assert "bfloat16 at 0.015 times the speed of float32" in sentence


def test_products_are_measured() -> None:
    assert 1e-3 < compute_dtype.bfloat16_ratio() < 1e3


@pytest.mark.parametrize("ratios", [(4.1, 0.1), (0.1, 4.1)])
def test_a_resumed_run_takes_the_dtype_it_began_with(
    recipe: Recipe, ratios: tuple[float, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    machine(monkeypatch, ratios[0])
    quantize(recipe, tmp_path / "whole", listener=Callback(lambda *_: None, told.append))
    assert any("bfloat16" in sentence for sentence in told) == (ratios[0] > 1)
    write = Artifact.write_behind

    def until_second_block(self: Artifact, tensor: StoredTensor) -> None:
        if tensor.name.startswith("model.layers.1"):
            raise KeyboardInterrupt
        write(self, tensor)

    monkeypatch.setattr(Artifact, "write_behind", until_second_block)
    with pytest.raises(KeyboardInterrupt):
        quantize(recipe, tmp_path / "out")
    monkeypatch.setattr(Artifact, "write_behind", write)
    machine(monkeypatch, ratios[1])
    quantize(recipe, tmp_path / "out")
    expected, resumed = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("whole", "out"))
    assert resumed == expected
    assert Artifact(tmp_path / "out").run()["recipe"]["compute_dtype"] == ("bfloat16" if ratios[0] > 1 else None)
