"""Checks, before any work, that the GGUF file of a run can hold the source's tokenizer, and that llama.cpp loads it.

The small files that the artifact would hold are written to a temporary folder, from which the content of the GGUF file
follows. Its vocabulary is compared with the tokenizer that transformers loads. Where llama.cpp is installed, it loads
the file without the bytes of tensors, and splits hard texts.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from lqexport.converters.gguf.writer import content_of
from lqexport.converters.models.architectures import architecture_of
from lqexport.converters.plan import PlannedTensor
from lqexport.evaluation.outline import load_outline
from lqexport.models.source import GGUFSource, HuggingFaceSource, Source
from lqexport.models.source_view import opened
from lqexport.planning.planned_artifact import PlannedArtifact
from lqexport.planning.tokenizer_check import check_kept, check_vocabulary, compare_splits, texts_to_split
from lqexport.recipe import Recipe


def check_file(source: Source, recipe: Recipe, planned: list[PlannedTensor]) -> list[str]:
    """Returns sentences about what the GGUF file of a run will do otherwise than the source, or will lack.

    Raises UserError if the file cannot hold the tokenizer: if llama.cpp has no such tokenizer, if texts or ids of
    tokens are not those that transformers loads, or if llama.cpp splits plain text into other tokens. Also if llama.cpp
    does not load the file.
    """
    with tempfile.TemporaryDirectory() as temporary:
        artifact = PlannedArtifact(source, recipe, planned, Path(temporary))
        source.copy_model_files(artifact.model_folder)
        return _check(artifact)


def _check(artifact: PlannedArtifact) -> list[str]:
    source, folder, architecture = artifact.source, artifact.model_folder, architecture_of(artifact.source.config)
    model, rows = opened(source), source.shape(architecture.embedding)[0]
    tokenizer, texts = None, tuple[str, ...]()
    if isinstance(model, GGUFSource):
        warnings = check_kept(model, rows)
    elif isinstance(model, HuggingFaceSource) and not model.has_tokenizer():
        warnings = [
            f"{source.name} has no tokenizer, and a GGUF file needs one: put its files there, or into OUT/model."
        ]
    else:
        tokenizer = source.tokenizer()
        warnings = check_vocabulary(folder, tokenizer, rows)
        texts = texts_to_split(tokenizer, rows)
    content = content_of(artifact, with_tokenizer=isinstance(model, GGUFSource) or tokenizer is not None)
    loaded = load_outline(content, texts, encoder=architecture.encoder)
    if loaded is None:
        return warnings
    if tokenizer is not None:
        warnings += compare_splits(folder, tokenizer, texts, loaded.splits)
    return warnings + [loaded.left_out] * bool(loaded.left_out)
