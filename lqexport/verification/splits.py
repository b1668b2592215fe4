"""Compares how a GGUF file splits text with the source's tokenizer.json: the word splitter and the merges."""

from __future__ import annotations

from typing import Any

from lqexport.converters.gguf.reader import GGUFModel
from lqexport.converters.gguf.vocabulary import read_vocabulary
from lqexport.errors import UserError, well_formed
from lqexport.models.interface import Weights
from lqexport.models.source import HuggingFaceSource, Source

ALIKE = (
    {"llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"},
    {"gpt-2", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat", "a.x-4.0", "mellum", "modern-bert",
     "exaone4"},
    {"qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"},
    {"gpt-4o", "llama4", "kanana2", "talkie"},
    {"bailingmoe", "bailingmoe2", "llada-moe"},
    {"glm4", "chatglm-bpe"},
)  # fmt: skip
"""Names by which llama.cpp splits words alike (`src/llama-vocab.cpp`)."""


def different_splits(file: Weights, source: Source) -> list[str]:
    """Returns sentences about how a GGUF file splits text otherwise than the source's tokenizer.json says.

    Nothing is said of other files, of other sources, and of a source whose tokenizer is not known to fit llama.cpp.
    """
    if not isinstance(file, GGUFModel) or not isinstance(source, HuggingFaceSource):
        return []
    try:
        vocabulary = read_vocabulary(source.folder)
    except UserError:
        return []
    if vocabulary.model != "gpt2":
        return []
    with well_formed(f"The tokenizer in {file.path}"):
        return _differences(file.metadata, vocabulary.pre, vocabulary.merges)


def _differences(metadata: dict[str, Any], splitter: str, merges: list[str]) -> list[str]:
    given, found = metadata.get("tokenizer.ggml.pre"), []
    if given != splitter and not any({given, splitter} <= names for names in ALIKE):
        found.append(f"tokenizer.ggml.pre is {given!r}, and the source's tokenizer splits words as {splitter!r} does.")
    ours = metadata.get("tokenizer.ggml.merges") or []
    if ours != merges:
        pairs = zip(ours, merges, strict=False)
        first = next((number for number, pair in enumerate(pairs) if pair[0] != pair[1]), min(len(ours), len(merges)))
        found.append(
            f"The file has {len(ours)} merges, and the source's tokenizer {len(merges)}; they differ from number "
            f"{first} on."
        )
    return found
