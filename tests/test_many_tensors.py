"""Before work, calls grow no faster than the tensors of a model of 10,000, and few files are opened."""

from __future__ import annotations

import cProfile
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lqexport.converters.folders import shards
from lqexport.converters.models.families.qwen import QWEN2
from lqexport.converters.models.tensor_names import gguf_names
from lqexport.exporting import export
from lqexport.models.inspect import inspect
from lqexport.models.source import open_source
from lqexport.planning.dryrun import preview
from lqexport.planning.recipe_plan import plan_recipe
from lqexport.recipe import Recipe
from lqexport.storage.artifact import manifest_bytes

SIZE = 32
LAYERS = {"fewer": 83, "many": 833}


class Counts(NamedTuple):
    """The number of function calls that a function made, and of the files of tensors that it opened."""

    calls: int
    opened: int


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of 1,000 and of 10,000 tensors, which are all zero; their files have no blocks on the disk."""
    return {name: write_model(tmp_path_factory.mktemp(name), layers) for name, layers in LAYERS.items()}


def write_model(folder: Path, layers: int) -> Path:
    """Writes a Qwen2 of 12 tensors a block."""
    config: dict[str, Any] = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rms_norm_eps": 1e-5}
    config |= {"hidden_size": SIZE, "intermediate_size": SIZE, "num_hidden_layers": layers, "vocab_size": SIZE}
    config |= {"num_attention_heads": 1, "num_key_value_heads": 1, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    names = [name for name in gguf_names(QWEN2, layers) if re.search(r"(^model.*weight|[qkv]_proj.bias)$", name)]
    header, end = {}, 0
    for name in names:
        shape = [SIZE] if "norm" in name or name.endswith("bias") else [SIZE, SIZE]
        begin, end = end, end + 2 * SIZE ** len(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


@pytest.fixture
def count(opened: list[Path]) -> Callable[[Callable[[], Any]], Counts]:
    """A function that runs another and returns what it did."""

    def run(function: Callable[[], Any]) -> Counts:
        opened.clear()
        profile = cProfile.Profile()
        profile.runcall(function)
        return Counts(sum(entry.callcount for entry in profile.getstats()), len(opened))

    return run


def check_linear(fewer: Counts, many: Counts) -> None:
    """Checks that ten times the tensors take about ten times the calls, and no more files."""
    assert 50_000 < many.calls < 11 * fewer.calls
    assert many.opened == fewer.opened <= 4


def recipe(model: Path, target: str) -> Recipe:
    return Recipe(str(model), target, method="rtn")


def test_a_listing(models: dict[str, Path], count: Callable[..., Counts]) -> None:
    assert len(inspect(models["many"]).entries) > 9_990
    check_linear(*(count(lambda model=model: inspect(model)) for model in models.values()))


def test_a_dry_run(models: dict[str, Path], count: Callable[..., Counts], tmp_path: Path) -> None:
    previews = (lambda model=model: preview(recipe(model, "gptq:4-g32"), tmp_path / "out") for model in models.values())
    check_linear(*map(count, previews))


def test_the_plan_of_a_mix(models: dict[str, Path], count: Callable[..., Counts]) -> None:
    sources = (open_source(str(model)) for model in models.values())
    check_linear(
        *(count(lambda source=source: plan_recipe(source, recipe(source.name, "gguf:Q4_K_M"))) for source in sources)
    )


def test_the_plan_of_a_gptq_folder(
    models: dict[str, Path], count: Callable[..., Counts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_write_shard", lambda *_: None)
    artifacts = [write_artifact(tmp_path / name, model) for name, model in models.items()]
    check_linear(*(count(lambda out=out: export(out, out.with_suffix(".gptq"))) for out in artifacts))


def write_artifact(out: Path, model: Path) -> Path:
    """Writes a finished artifact of a model without its tensors."""
    (out / "model").mkdir(parents=True)
    tensors = preview(recipe(model, "gptq:4-g32"), out.with_suffix(".none")).tensors
    entries = [{"name": x.name, "codec": x.codec_name, "shape": list(x.shape), "sha256": "0" * 64} for x in tensors]
    (out / "manifest.json").write_bytes(manifest_bytes({"tensors": entries, "files": {}}))
    run = {"recipe": {"dampening": 0.01, "target": "gptq:4-g32"}, "versions": {"lqexport": "0"}}
    (out / "run.json").write_text(json.dumps(run))
    (out / "model" / "config.json").write_text((model / "config.json").read_text())
    return out
