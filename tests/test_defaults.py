"""The settings that a recipe leaves open are chosen by the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lqexport.pipeline.quantize import quantize
from lqexport.planning.defaults import settled
from lqexport.recipe import Recipe
from lqexport.storage.artifact import Artifact

CONFIGS = Path(__file__).parent / "configs"
ASYMMETRIC = ("quantized", True, "normalized")
FULL = ("full", False, "guided")


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("llama-3.1-8b", {}, ASYMMETRIC),
        ("llama-3.1-8b", {"moments": "guided"}, ("quantized", True, "guided")),
        ("llama-3.1-8b", {"prefix": "full"}, FULL),
        ("llama-3.1-8b", {"prefix": "full", "moments": "normalized"}, ("full", False, "normalized")),
        ("llama-3.1-8b", {"asymmetric": False}, FULL),
        ("llama-3.1-8b", {"asymmetric": False, "prefix": "quantized"}, ("quantized", False, "normalized")),
        ("llama-3.1-8b", {"target": "gguf:auto", "size": "4bpw"}, ("quantized", True, "guided")),
        ("llama-3.1-8b", {"target": "exl2", "bits": 3.0}, ("quantized", True, "guided")),
        ("llama-3.1-8b", {"output_groups": 2}, FULL),
        ("llama-3.1-8b", {"rank": 8, "factor_bytes": 100}, FULL),
        ("llama-3.1-8b", {"method": "rtn"}, FULL),
        ("llama-3.1-70b", {}, FULL),
        ("llama-3.1-70b", {"asymmetric": True}, ASYMMETRIC),
        ("mixtral-8x7b", {}, FULL),
        ("mixtral-8x7b", {"prefix": "quantized"}, ("quantized", False, "normalized")),
    ],
)
def test_what_is_left_open_follows_from_the_model(
    name: str, options: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    complete = settled(Recipe(**({"source": name, "target": "gguf:Q4_K"} | options)), config)
    assert (complete.prefix, complete.asymmetric, complete.moments) == expected
    assert settled(complete, config) == complete


def test_a_run_records_what_was_settled(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    recipe = Recipe(str(tiny_model), "gguf:Q4_0", calibration=str(text), samples=4, sequence_length=32, tune=0)
    quantize(recipe, tmp_path / "out")
    ran = Artifact(tmp_path / "out").report()["run"]["recipe"]
    assert (ran["prefix"], ran["asymmetric"], ran["moments"]) == ASYMMETRIC
    quantize(Recipe(**ran), tmp_path / "again")
    assert Artifact(tmp_path / "out").manifest() == Artifact(tmp_path / "again").manifest()


@pytest.mark.parametrize(
    ("target", "bits", "effort", "sweeps", "tuned"),
    [
        ("gguf:Q4_K", None, "default", 2, 0),
        ("gguf:Q3_K", None, "default", 2, 64),
        ("gguf:Q3_K", None, "fast", 0, 0),
        ("mlx:4-g64", None, "default", 2, 0),
        ("exl2", 3.5, "default", 2, 64),
        ("exl2", 4.0, "default", 2, 0),
        ("exl3", 3.5, "default", 0, 64),
        ("exl3", 4.0, "default", 0, 0),
        ("exl3:3.5", None, "default", 0, 64),
        ("exl3:4", None, "default", 0, 0),
        ("exl3:4", None, "best", 2, 64),
    ],
)
def test_sweeps_and_tuning_follow_from_target_and_effort(
    target: str, bits: float | None, effort: Any, sweeps: int, tuned: int
) -> None:
    recipe = Recipe("model", target, bits=bits, effort=effort)
    assert (recipe.sweeps, recipe.tuned_sequences) == (sweeps, tuned)


@pytest.mark.parametrize(
    ("size", "effort", "smooth", "tuned"),
    [
        ("Q4_K_M", "default", True, 0),
        ("q3_k_m", "default", False, 64),
        ("4.25bpw", "default", True, 0),
        ("3.9bpw", "default", False, 64),
        ("4.5GB", "default", True, 0),  # of 8.03 billion weights
        ("3.5GB", "default", False, 64),
        ("4.5GB", "best", True, 64),
    ],
)
def test_a_size_has_the_defaults_of_types_of_its_bits(size: str, effort: Any, smooth: bool, tuned: int) -> None:
    config = json.loads((CONFIGS / "llama-3.1-8b.json").read_text())
    complete = settled(Recipe("model", "gguf:auto", size=size, effort=effort), config)
    assert (complete.smooth, complete.tune) == (smooth, tuned)
