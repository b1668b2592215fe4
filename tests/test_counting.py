"""Weights and their bits are counted alike by plans, forecasts, artifacts and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lqexport.converters.counting import copied_output, counted, counted_linears
from lqexport.converters.models.architectures import architecture_of
from lqexport.errors import UserError
from lqexport.exporting import export
from lqexport.models.inspect import inspect
from lqexport.pipeline.quantize import quantize
from lqexport.planning.dryrun import Preview, preview
from lqexport.planning.forecast import forecast
from lqexport.recipe import Recipe
from lqexport.verification.comparison import compare

WEIGHTS = 512 * 256 + 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256) + 5 * 256
"""Weights of the tiny model, whose output is its embedding: embedding, linears of two blocks, norms."""


def planned(model: Path, **options: Any) -> Preview:
    return preview(Recipe(str(model), **options), Path("does-not-exist"))


@pytest.mark.parametrize(
    "options",
    [
        {"target": "gguf:Q4_0"},
        {"target": "gguf:Q4_0", "rank": 8},
        {"target": "native:table-3", "rank": 8},
        {"target": "mlx:4-g64"},
        {"target": "exl2", "bits": 3.5},
        {"target": "exl2", "bits": 3.5, "head_bits": 16},
        {"target": "exl3", "bits": 2.5},
        {"size": "5bpw"},
    ],
)
def test_every_plan_has_the_models_weights(options: dict[str, Any], tiny_model: Path) -> None:
    """Neither low-rank factors nor a copy of the embedding as output make a model larger."""
    shown = planned(tiny_model, **options)
    estimate = forecast(tiny_model, Recipe(str(tiny_model), **options)).as_json()
    assert counted(shown.entries, copied_output(shown.config)).weights == estimate["weights"] == WEIGHTS
    assert estimate["tensor_bytes"] == shown.tensor_bytes
    assert shown.bits_per_weight == estimate["bits_per_weight"] == 8 * shown.tensor_bytes / WEIGHTS


def test_an_output_in_more_bytes_has_more_bits(tiny_model: Path) -> None:
    small, large = (planned(tiny_model, target="exl2", bits=3.5, head_bits=bits) for bits in (2, 8))
    assert small.tensor_bytes < large.tensor_bytes
    assert small.bits_per_weight < large.bits_per_weight
    bits = [counted_linears(shown.entries, architecture_of(shown.config)).bits_per_weight for shown in (small, large)]
    assert bits[0] == bits[1] == pytest.approx(3.5, rel=0.01)


def test_factors_count_for_their_linears(tiny_model: Path) -> None:
    plain, corrected = (planned(tiny_model, target="gguf:Q4_0", rank=rank) for rank in (0, 8))
    counts = [counted_linears(shown.entries, architecture_of(shown.config)) for shown in (plain, corrected)]
    assert counts[0].bits_per_weight == 4.5
    assert counts[1].weights == counts[0].weights
    assert counts[1].nbytes - counts[0].nbytes == corrected.tensor_bytes - plain.tensor_bytes


def test_a_forecast_refuses_a_size_that_no_types_reach(tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"--size 0\.5bpw is"):
        forecast(tiny_model, Recipe(str(tiny_model), size="0.5bpw"))


def test_all_programs_say_the_same_of_an_output_of_its_own(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    report = quantize(Recipe(str(tiny_model), "exl2", bits=3.5, method="rtn"), tmp_path / "out")
    folder = export(tmp_path / "out", tmp_path / "folder")
    assert "lm_head.weight" in {entry.name for entry in inspect(folder).entries}
    result = compare([folder], str(tiny_model), text=str(text), windows=1).files[0]
    listings = [inspect(path).as_json() for path in (tmp_path / "out", folder)]
    assert {report["bits_per_weight"], result.bits_per_weight, *(each["bits_per_weight"] for each in listings)} == {
        8 * result.nbytes / WEIGHTS
    }
    of_linears = [report, *listings, vars(result)]
    assert len({each["linears_bits_per_weight"] for each in of_linears}) == 1
