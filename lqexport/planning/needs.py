"""Checks what a run will need, before any work: a tokenizer that a file can hold, a file that llama.cpp loads."""

from __future__ import annotations

from lqexport.converters.exl3.support import warnings_of as exl3_warnings
from lqexport.converters.gguf.mixes import other_meaning
from lqexport.converters.models.architectures import architecture_of, normalized
from lqexport.converters.models.families.deepseek import in_two
from lqexport.converters.models.further import is_beyond
from lqexport.converters.plan import PlannedTensor
from lqexport.errors import listed
from lqexport.models.imatrix import imatrix_of
from lqexport.models.source import GGUFSource, HuggingFaceSource, Source
from lqexport.models.source_view import opened
from lqexport.planning.file_check import check_file
from lqexport.planning.recipe_plan import calibrates
from lqexport.planning.small_files import check_small_files
from lqexport.planning.type_choices import check_size
from lqexport.recipe import Recipe

WITH_TOKENIZER_JSON = {"exl2": "ExLlamaV2", "exl3": "ExLlamaV3"}
"""Family of targets -> engine that loads a folder only with a tokenizer.json (see `packed.check_source_files`)."""


def check_needs(source: Source, recipe: Recipe, planned: list[PlannedTensor], limit_bytes: int | None) -> list[str]:
    """Returns the warnings of `warnings_of`, after checking what a run of `recipe` will need.

    limit_bytes   what `size_limit` returns

    Raises UserError if the run would lack something that can be known at once.

    A run for a GGUF file needs a tokenizer that llama.cpp has, and a file that llama.cpp loads. One of a .gguf file
    always writes a tokenizer. Small files of the source must be sound (`check_small_files`). An importance matrix must
    be the model's. Types must be able to reach a size. What a run that calibrates needs, `calibration_at_hand` checks.
    """
    check_size(recipe, planned, limit_bytes)
    if isinstance(opened(source), GGUFSource) and not calibrates(recipe, source, planned):
        source.tokenizer()
    return warnings_of(source, recipe, planned)


def warnings_of(source: Source, recipe: Recipe, planned: list[PlannedTensor]) -> list[str]:
    """Returns warnings about what a run will lack, what its file will do otherwise than the source, and a target that
    is not what llama.cpp calls so.

    Raises UserError as `unweighted` and `file_warnings` do.
    """
    lacking = [*without_effect(recipe), *unweighted(source, recipe, planned), *left_out(source, recipe, planned)]
    written = [*file_warnings(source, recipe, planned), *engine_warnings(source, recipe)]
    return [*lacking, *tokenizer_warnings(source, recipe), *written, *other_meaning(recipe.parsed_target)]


def without_effect(recipe: Recipe) -> list[str]:
    """Returns a warning about options that need a calibration text, where method rtn reads none; else []."""
    needing = {"tune": recipe.tune, "asymmetric": recipe.asymmetric, "output_groups": recipe.output_groups > 1}
    given = [name for name, value in needing.items() if value]
    if not given or recipe.method != "rtn" or recipe.calibrates:
        return []
    return [f"Method rtn reads no calibration text, so {listed(given)} will have no effect."]


def engine_warnings(source: Source, recipe: Recipe) -> list[str]:
    """Returns what ExLlamaV3 does otherwise with the folder of a run; [] for other targets."""
    if recipe.parsed_target.family != "exl3":
        return []
    return exl3_warnings(architecture_of(source.config), normalized(source.config))


def tokenizer_warnings(source: Source, recipe: Recipe) -> list[str]:
    """Returns a warning if the folder of a run for ExLlamaV2 or ExLlamaV3 will lack a tokenizer.json; else []."""
    engine, model = WITH_TOKENIZER_JSON.get(recipe.parsed_target.family), opened(source)
    if engine is None or not isinstance(model, HuggingFaceSource) or model.gives_tokenizer_json():
        return []
    return [
        f"{engine} needs a tokenizer.json, and {source.name} has none. Save the tokenizer there with transformers, "
        "which writes one, or into OUT/model."
    ]


def unweighted(source: Source, recipe: Recipe, planned: list[PlannedTensor]) -> list[str]:
    """Returns a warning if the recipe's importance matrix lacks linears; else [].

    Raises UserError if it cannot be read, or is of another model.
    """
    imatrix = imatrix_of(source, recipe)
    return imatrix.missing(planned) if imatrix else []


def left_out(source: Source, recipe: Recipe, planned: list[PlannedTensor]) -> list[str]:
    """Returns a warning if a GGUF file will lack blocks of the source that predict further tokens, unasked; else []."""
    architecture, layers = architecture_of(source.config), source.config["num_hidden_layers"]
    kept = {tensor.name for tensor in planned}
    names = [name for name in source.names() if name not in kept and is_beyond(architecture, layers, name)]
    if not names or not recipe.mtp or recipe.parsed_target.family != "gguf":
        return []
    without = f"GGUF files of {architecture.classes[0]} are written without them"
    drafts = in_two(architecture) if architecture.cuttable else architecture
    reason = "some of their tensors are missing" if drafts.predictor else without
    return [f"Blocks that predict further tokens are left out, since {reason}: {listed(names, 3)}."]


def file_warnings(source: Source, recipe: Recipe, planned: list[PlannedTensor]) -> list[str]:
    """Returns what the GGUF file of a run will do otherwise than the source, as `check_file`; [] for other targets.

    Raises UserError as `check_small_files` and `check_file` do.
    """
    model, rows = opened(source), source.shape(architecture_of(source.config).embedding)[0]
    if isinstance(model, HuggingFaceSource):
        check_small_files(model.folder, rows)
    if recipe.parsed_target.family != "gguf":
        return []
    return check_file(source, recipe, planned)
