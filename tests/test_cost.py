"""The costs that `plan` computes for large models, and its formulas compared with measured runs of small models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from lqexport.cli.app import app
from lqexport.errors import UserError
from lqexport.formats.gguf_vectors import GGUF_VECTORS
from lqexport.planning.cost import SEARCH_SECONDS, Work, operations_estimate, search_seconds
from lqexport.planning.forecast import ConfigModel, Forecast, forecast
from lqexport.planning.memory import PROCESS_BYTES, memory_estimate, tuned_numbers
from lqexport.planning.recipe_plan import plan_recipe
from lqexport.recipe import Recipe
from lqexport.sizes import memory_size

CONFIGS = Path(__file__).parent / "configs"
WEIGHTS = {"llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496, "llama-3.1-405b": 405_853_388_800}
WEIGHTS |= {"mixtral-8x7b": 46_702_792_704, "deepseek-v3": 671_026_419_200, "deepseek-v2-lite": 15_706_484_224}
"""Number of parameters, as the model's page gives it."""
ACTIVE = {"mixtral-8x7b": 12.9e9, "deepseek-v3": 37e9, "deepseek-v2-lite": 2.4e9}
"""Number of parameters that a token goes through, as the model's page gives it."""

SMALL = {"samples": 8, "sequence_length": 64, "descent": 1, "tune": 2}
MODELS = {"2": (2, 1536, 512), "12": (12, 1536, 512), "wide": (1, 4096, 16384)}
"""Models of hidden size 512: number of blocks, width of the MLP, size of the vocabulary."""
MEASURE = """
import json, pathlib, runpy, sys
import psutil
sys.path.insert(0, str(pathlib.Path(sys.argv[1]).parent))
depth, work, options = runpy.run_path(sys.argv[1]), pathlib.Path(sys.argv[2]), json.loads(sys.argv[4])
measured = {}
for name, (layers, inner, vocabulary) in json.loads(sys.argv[3]).items():
    depth["write_model"](work / name / "model", layers, 512, inner, vocabulary)
    measured[name] = {"before": psutil.Process().memory_info().rss, **depth["run_here"](work / name, options)}
print(json.dumps(measured))
"""


@cache
def planned(name: str, **options: Any) -> Forecast:
    path = CONFIGS / f"{name}.json"
    return forecast(path, Recipe(str(path), "gguf:Q4_K", **options), "24GB", "64GB")


def run_plan(*arguments: object, status: int) -> str:
    result = CliRunner().invoke(app, ["plan", *map(str, arguments), "--target", "gguf:Q4_K"])
    assert result.exit_code == status, result.output
    return result.output


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_config_is_enough(name: str, tmp_path: Path) -> None:
    (recipe := tmp_path / "recipe.toml").write_text("mtp = false\n")  # the page counts no such block
    memory = ("--gpu", "1TB", "--host", "1TB")
    plan = json.loads(run_plan(CONFIGS / f"{name}.json", *memory, "--json", "--recipe", recipe, status=0))
    assert plan["weights"] == WEIGHTS[name]
    assert plan["tensor_bytes"] == pytest.approx(plan["bits_per_weight"] * WEIGHTS[name] / 8)
    assert plan["disk"]["artifact"] == plan["tensor_bytes"]
    assert plan["rates"]["measured"] is False
    # The passes multiply every token by every weight of the blocks: once in each of two models, or, for experts, three
    # times forward or backward in one, and in tuning.
    times = 3 if name in ACTIVE else 2
    assert plan["operations"]["passes"] > times * 2 * 64 * 512 * 0.8 * ACTIVE.get(name, WEIGHTS[name])


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.1-70b", "mixtral-8x7b"])
def test_the_defaults_fit_a_gpu_of_24_gb(name: str) -> None:
    assert planned(name).too_large == []


def test_passes_that_memory_cannot_hold_are_made_again() -> None:
    work = planned("llama-3.1-8b").work
    forecasts = [Forecast(work, gpu * 10**9, 64 * 10**9) for gpu in (14, 24, 80)]
    held = [predicted.placement.held for predicted in forecasts]
    passes = [predicted.as_json()["operations"]["passes"] for predicted in forecasts]
    assert 0 <= held[0] < held[1] < held[2] == work.tokens
    assert passes == sorted(set(passes), reverse=True)
    assert all(predicted.too_large == [] for predicted in forecasts)


@pytest.mark.parametrize(("name", "share"), [("mixtral-8x7b", 1 / 4), ("deepseek-v3", 1 / 32)])
def test_of_experts_only_those_that_a_token_goes_to_count(name: str, share: float) -> None:
    planned_work = planned(name).work
    work = replace(planned_work, recipe=replace(planned_work.recipe, tune=0))
    expert, attention = (next(t for t in work.linears if part in t.name) for part in (".experts.", ".o_proj"))
    assert (work.share(expert), work.share(attention)) == (share, 1)
    forward = operations_estimate(work).passes / (3 * work.tokens)
    assert 0.95 < forward / (2 * ACTIVE[name]) < 1.05


def test_memory_is_that_of_the_block_with_the_most_weights() -> None:
    """DeepSeek-V3's first three blocks have no experts."""
    work = planned("deepseek-v3").work
    assert len(work.block) == 5 + 3 + 3 * 256
    assert sum(".layers.61." in tensor.name for tensor in work.tensors) > 3 * 256  # it predicts a further token
    assert sum(tensor.weights for tensor in work.block) == pytest.approx(11.5e9, rel=0.01)
    assert planned("deepseek-v2-lite").too_large == []


def test_some_experts_at_a_time_where_all_do_not_fit() -> None:
    work = planned("deepseek-v3").work
    forecasts = {gpu: Forecast(work, gpu * 10**9, 96 * 10**9) for gpu in (24, 48, 80, 400)}
    assert [bool(predicted.too_large) for predicted in forecasts.values()] == [True, False, False, False]
    parts = [predicted.placement.parts for predicted in forecasts.values()]
    assert parts == [256, 16, 8, 1]
    costs = [predicted.as_json() for predicted in forecasts.values()]
    passes, read = (
        [cost[group][item] for cost in costs] for group, item in (("operations", "passes"), ("disk", "read"))
    )
    assert passes == sorted(passes, reverse=True)
    assert read == sorted(read, reverse=True)


@pytest.mark.parametrize("target", ["native:mxint-3-g32", "native:table-3", "gguf:IQ4_XS", "gptq:4-g128"])
def test_every_kind_of_grid_is_planned(target: str) -> None:
    path = CONFIGS / "llama-3.1-8b.json"
    assert forecast(path, Recipe(str(path), target, tune=8), "24GB", "64GB").stages["tuning"].device > 0


def test_searches_of_codebooks_take_time() -> None:
    path = CONFIGS / "llama-3.1-8b.json"
    works = {name: forecast(path, Recipe(str(path), f"gguf:{name}"), "24GB", "64GB").work for name in ("IQ2_S", "Q2_K")}
    linears = sum(tensor.weights for tensor in works["IQ2_S"].linears)
    assert search_seconds(works["IQ2_S"]) == pytest.approx(linears * (0.4e-6 + 2 * 0.21e-6))
    assert search_seconds(works["Q2_K"]) == 0
    assert {codec.name for codec in GGUF_VECTORS} == SEARCH_SECONDS.keys()
    walks = forecast(path, Recipe(str(path), "exl3:3"), "24GB", "64GB")
    searched = linears + walks.work.outer  # the output has walks of 6 bits
    assert search_seconds(walks.work) == pytest.approx(searched * 0.75e-5)
    refined = forecast(path, Recipe(str(path), "exl3:3", effort="best"), "24GB", "64GB")
    assert search_seconds(refined.work) == pytest.approx(searched * (0.75e-5 + 2 * 0.5e-5))
    assert tuned_numbers(walks.work) == (2 * 32 + 1) * 4096 + sum(sum(each.matrix) for each in walks.work.linears)


def test_what_does_not_fit_is_said() -> None:
    output = run_plan(CONFIGS / "llama-3.1-70b.json", "--gpu", "8GB", "--host", "64GB", status=1)
    assert "Does not fit: a pass through a block takes" in output
    assert "no GPU has been timed" in output
    assert planned("llama-3.1-8b", tune=0).too_large == []


def test_depth_costs_disk_but_no_memory_before_tuning() -> None:
    shallow = forecast_of(planned("llama-3.1-8b").work.config)
    deep = forecast_of(shallow.work.config | {"num_hidden_layers": 64})
    for stage, needed in shallow.stages.items():
        assert (deep.stages[stage] == needed) == (stage != "tuning")
    assert deep.as_json()["disk"]["read"] > 1.7 * shallow.as_json()["disk"]["read"]


def forecast_of(config: dict[str, Any]) -> Forecast:
    """Returns the forecast for a config that is not on disk. Memory does not hold all hidden states."""
    recipe = Recipe("config.json", "gguf:Q4_K")
    return Forecast(Work(recipe, config, plan_recipe(ConfigModel(config), recipe)), 24 * 10**9, 24 * 10**9)


def test_tuned_numbers_are_those_of_the_superblocks() -> None:
    """Q4_K stores a float16 scale and a float16 offset per 256 weights, and every gain of a norm is one number."""
    work = planned("llama-3.1-8b").work
    linears = sum(tensor.weights for tensor in work.linears)
    assert tuned_numbers(work) == 2 * linears // 256 + (2 * 32 + 1) * 4096


@pytest.mark.parametrize(("text", "count"), [("24GB", 24 * 10**9), ("1.5 GiB", 3 * 2**29), ("512mb", 512 * 10**6)])
def test_amounts_of_memory(text: str, count: int) -> None:
    assert memory_size(text) == count


def test_what_is_no_amount_is_said() -> None:
    with pytest.raises(UserError, match="like 24GB"):
        memory_size("4bpw")
    with pytest.raises(UserError, match=r"There is no .*nowhere"):
        forecast(Path("nowhere"), Recipe("nowhere", "gguf:Q4_K"), None, None)


@pytest.fixture(scope="module")
def measured(
    root: Path, load_script: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, dict[str, float]]]:
    """Peak resident bytes of each command, in one process that quantizes, writes and verifies the models in turn.

    A run before it compiles what is not compiled yet: compiling takes more memory than these models do.
    """
    work = tmp_path_factory.mktemp("depth")
    options = [part for key, value in SMALL.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    environment = os.environ | load_script("bench/depth.py").STEADY

    def measure(folder: Path, models: dict[str, tuple[int, int, int]]) -> dict[str, dict[str, float]]:
        arguments = [
            root / "bench" / "depth.py",
            folder,
            json.dumps(models),
            json.dumps(["--target", "gguf:Q4_K", *options]),
        ]
        command = [sys.executable, "-c", MEASURE, *map(str, arguments)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        peaks: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
        return peaks

    measure(work / "before", {"1": (1, 1536, 512)})
    return work, measure(work, MODELS)


@pytest.mark.parametrize("command", ["quantize", "to-gguf", "verify"])
def test_memory_does_not_grow_with_depth(measured: tuple[Path, dict[str, dict[str, float]]], command: str) -> None:
    """Twelve blocks have 58 MB more of float16 weights than two, 8 per cent of the peak.

    A first run leaves some MB in the process, and on a busy machine more tensors wait to be written.
    """
    _, peaks = measured
    assert peaks["12"][command] < 1.07 * peaks["2"][command]


def test_the_memory_of_a_run_is_what_was_computed(measured: tuple[Path, dict[str, dict[str, float]]]) -> None:
    """The estimate, without the bytes of the process itself, is right within a factor of 1.5."""
    work, peaks = measured
    recipe = Recipe(str(work / "wide" / "model"), "gguf:Q4_K", **SMALL)
    predicted = forecast(work / "wide" / "model", recipe, None, None)
    expected = memory_estimate(predicted.work, predicted.placement) - PROCESS_BYTES
    taken = peaks["wide"]["quantize"] - peaks["wide"]["before"]
    assert 1 / 1.5 < taken / expected < 1.5


def test_launches_are_counted_without_a_gpu(tiny_model: Path, load_script: Callable[[str], ModuleType]) -> None:
    script = load_script("bench/launches.py")
    counts = {}
    for samples in (2, 4):  # one batch and two
        recipe = Recipe(str(tiny_model), "gguf:Q4_K", samples=samples)
        counts[samples] = script.count(forecast(tiny_model, recipe).work).counts
    less, more = counts[2], counts[4]
    assert more["moments", "launches"] > less["moments", "launches"]
    for stage in ("a pass of one batch", "factors", "targets", "fit", "feedback", "descent"):
        assert more[stage, "launches"] == less[stage, "launches"] > 0
    assert less["targets", "waits"] == 6 * 7
