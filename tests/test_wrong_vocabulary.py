"""Faults of tokenizers that the models of `wrong_files` do not have: other scores, and tokens around a text."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from family_cases import make_model, make_tokenizer
from family_cases import pieces as pieces
from rewritten_files import Spoil, rewritten
from spoiled_files import gguf_file
from wrong_files import TOKENS, each, key, without

from lqexport.models.source import GGUFSource, Source, open_source
from lqexport.verification.splits import different_splits
from lqexport.verification.verify_vocabulary import vocabulary_differences

SCORES, PREFIX = f"{TOKENS}scores", f"{TOKENS}add_space_prefix"
BOS, EOS = f"{TOKENS}add_bos_token", f"{TOKENS}add_eos_token"


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory, pieces: Path) -> Callable[[str, Spoil], list[str]]:
    """A function that returns what is said of the file of a model with a tokenizer, after a change of it."""
    folder = tmp_path_factory.mktemp("vocabulary")
    model = make_model("llama")

    @cache
    def source_and_file(tokenizer: str) -> tuple[Source, Path]:
        made = folder / tokenizer
        model.save_pretrained(made)
        make_tokenizer(tokenizer, pieces).save_pretrained(made)
        return open_source(str(made)), gguf_file(made, made, "gguf:F16")

    def differences(tokenizer: str, spoil: Spoil) -> list[str]:
        source, right = source_and_file(tokenizer)
        file = GGUFSource(rewritten(right, folder / "spoiled.gguf", spoil))
        return [*vocabulary_differences(file, source), *different_splits(file, source)]

    return differences


@pytest.mark.parametrize(
    ("tokenizer", "spoil", "expected"),
    [
        ("pieces", each(SCORES, lambda scores: [-score for score in scores]), "splits text otherwise"),
        ("pieces", key(PREFIX, False), "splits text otherwise"),
        ("pieces without prefix", key(PREFIX, True), "splits text otherwise"),
        ("pieces", key(BOS, False), "no BOS before a text"),
        ("pieces", key(EOS, True), "puts an EOS behind a text"),
        ("gpt-2", without(BOS), "no BOS before a text"),
    ],
)
def test_a_wrong_tokenizer_is_told(
    tokenizer: str, spoil: Spoil, expected: str, said: Callable[[str, Spoil], list[str]]
) -> None:
    sentences = said(tokenizer, spoil)
    assert len(sentences) == 1
    assert expected in sentences[0]


@pytest.mark.parametrize(
    ("tokenizer", "spoil"),
    [
        ("pieces", without()),
        ("pieces without prefix", without()),
        # llama.cpp's defaults are the source's.
        ("pieces", without(BOS, EOS, PREFIX)),
        ("llama-bpe", without(BOS, EOS)),
    ],
)
def test_a_right_tokenizer_passes(tokenizer: str, spoil: Spoil, said: Callable[[str, Spoil], list[str]]) -> None:
    assert said(tokenizer, spoil) == []
