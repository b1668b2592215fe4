"""Every number of a GGUF file's metadata that tensors are bound by is compared with them, in all sorts of blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from family_cases import config_and_shapes

from lqexport.checking.checking import metadata_problems
from lqexport.checking.opened import OpenFile, open_file
from lqexport.converters.gguf.config import Metadata, config_of
from lqexport.converters.gguf.writer import content_of
from lqexport.planning.forecast import ConfigModel
from lqexport.planning.planned_artifact import PlannedArtifact
from lqexport.planning.recipe_plan import plan_recipe
from lqexport.recipe import Recipe
from lqexport.storage.files import write_json

FREE = {
    "context_length", "altup.active_idx", "attention.indexer.top_k", "attention.sliding_window", "expert_gating_func",
    "attention.sliding_window_pattern", "expert_used_count", "hyper_connection.sinkhorn_iterations",
    "rope.scaling.original_context_length", "rope.dimension_count_swa", "rope.dimension_sections", "swiglu_clamp_exp",
    "attention.shared_kv_layers",
}  # fmt: skip
"""Numbers that no tensor is bound by. `verify` compares them with the source's."""
FREE_IN = {
    "deepseek-v32": {"attention.value_length"},
    "deepseek-v4": {"feed_forward_length", "rope.dimension_count"},
    "glm-dsa": {"attention.value_length"},
    "gpt-oss": {"feed_forward_length"},
    "hunyuan-moe": {"expert_feed_forward_length"},
    "kimi-linear": {"attention.value_length"},
    "mamba": {"attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
              "feed_forward_length", "rope.dimension_count"},
    "mimo2": {"rope.dimension_count"},
    "nemotron-h-latent": {"expert_shared_count", "feed_forward_length"},
    "qwen3next": {"feed_forward_length", "rope.dimension_count"},
}  # fmt: skip
"""Case -> numbers that are without effect in it, or of which only a part of heads is rotated."""
NAMES = ("llama", "phi3", "gpt2", "gemma3n", "gemma4-e", "llama4", "gpt-oss", "hunyuan-moe", "deepseek-v2",
         "deepseek-v32", "deepseek-v4", "kimi-linear", "mimo2", "qwen3next", "granite4moe", "nemotron-h-latent",
         "jamba-moe", "mamba", "lfm2moe")  # fmt: skip
"""Cases with, together, every sort of blocks."""


def outlined(name: str, folder: Path) -> OpenFile:
    """Returns the file of a case, without a tokenizer and without the bytes of its tensors."""
    config, _ = config_and_shapes(name)
    model, recipe = ConfigModel(config), Recipe(name, "gguf:F16")
    write_json(folder / "model" / "config.json", model.config)
    artifact = PlannedArtifact(model, recipe, plan_recipe(model, recipe), folder)  # type: ignore[arg-type]
    content = content_of(artifact, with_tokenizer=False)
    with (folder / "model.gguf").open("wb") as file:
        file.write(header := content.header())
        file.truncate(len(header) + content.nbytes)
    return open_file(folder / "model.gguf")


def errors_of(file: OpenFile, changes: dict[str, Any]) -> list[str]:
    """Returns the errors that are said of a file with other metadata."""
    problems = metadata_problems(replace(file, metadata=file.metadata | changes))
    return [problem.sentence for problem in problems if problem.level == "error"]


def doubled(value: Any) -> Any:
    return [doubled(each) for each in value] if isinstance(value, list) else 2 * value


@pytest.mark.parametrize("name", NAMES)
def test_each_number_that_tensors_are_bound_by(name: str, tmp_path: Path) -> None:
    file = outlined(name, tmp_path)
    assert errors_of(file, {}) == []
    start = f"{file.architecture}."
    numbers = {
        key: value
        for key, value in file.metadata.items()
        if key.startswith(start) and doubled(value) != value and type(value) in (int, list)
    }
    free = FREE - {"context_length"} if name == "gpt2" else FREE
    unnoticed = [key for key in numbers if not errors_of(file, {key: doubled(numbers[key])})]
    assert {key.removeprefix(start) for key in unnoticed} - free == FREE_IN.get(name, set())


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_files_that_say_no_heads_where_blocks_have_no_attention(name: str, tmp_path: Path) -> None:
    """llama.cpp's converter writes them."""
    file = outlined(name, tmp_path)
    counts = {f"{name}.{key}" for key in ("attention.head_count", "feed_forward_length")}
    others = {f"{name}.{key}" for key in ("attention.head_count_kv", "attention.key_length", "rope.dimension_count")}
    given = {key: 0 if key in counts else value for key, value in file.metadata.items() if key not in others}
    assert not [each for each in metadata_problems(replace(file, metadata=given)) if each.level == "error"]
    configs = [
        config_of(Metadata(name, file.entries[0], metadata), 512, {"lm_head.weight"}, {})
        for metadata in (given, file.metadata)
    ]
    assert configs[0] == configs[1]
