"""What is known of a GGUF file's tokenizer before any work: its vocabulary, special tokens, and splits in llama.cpp."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from llama_files import byte_level_bpe, training_text
from planned_files import said_before_work
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from lqexport.converters.gguf.header import read_header
from lqexport.converters.gguf.pretokenizers import splitter_named
from lqexport.converters.gguf.tokenizer import write_vocabulary
from lqexport.converters.gguf.vocabulary import read_vocabulary
from lqexport.errors import UserError
from lqexport.models.source import HuggingFaceSource
from lqexport.models.tokenizers import vocabulary_faults
from lqexport.storage.files import write_json

ROWS = 512
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture
def checked(smaller_model: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """A function that checks a tokenizer, saved with other files, as the source of a GGUF file."""

    def check(tokenizer: Tokenizer, rows: int = ROWS, **files: Any) -> list[str]:
        shutil.copy(smaller_model / "config.json", tmp_path)
        tensors = load_file(smaller_model / "model.safetensors")
        outer = {name: tensors[name][:rows] for name in ("model.embed_tokens.weight", "lm_head.weight")}
        save_file(tensors | outer, tmp_path / "model.safetensors")
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        for name, content in ({"tokenizer_config": NAMES} | files).items():
            write_json(tmp_path / f"{name}.json", content)
        return said_before_work(HuggingFaceSource(tmp_path, "model"))

    return check


def in_file(folder: Path, rows: int = ROWS) -> tuple[list[str], list[int], dict[str, int]]:
    """Returns texts, types and special ids of the vocabulary that a folder gives."""
    write_vocabulary(folder, folder / "vocabulary.gguf", rows)
    metadata = read_header(folder / "vocabulary.gguf")[0]
    ids = {key.split(".")[-1].removesuffix("_token_id"): metadata[key] for key in metadata if key.endswith("_token_id")}
    return metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], ids


def test_a_good_tokenizer_has_no_warning(checked: Callable[..., list[str]]) -> None:
    assert checked(byte_level_bpe()) == []


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": NAMES | {"added_tokens_decoder": {"501": {"content": "<x>", "special": True}}}},
        {"tokenizer_config": NAMES | {"extra_special_tokens": ["<x>"]}},
        {"tokenizer_config": NAMES | {"extra_special_tokens": {"image_token": "<x>"}}},
        {"tokenizer_config": NAMES, "special_tokens_map": {"additional_special_tokens": ["<x>"]}},
        {"tokenizer_config": NAMES | {"additional_special_tokens": ["<x>"]}},
        {"tokenizer_config": NAMES | {"eos_token": "<x>"}},
        {"tokenizer_config": NAMES | {"pad_token": "<x>"}, "generation_config": {"pad_token_id": 0}},
    ],
)
def test_added_tokens_of_every_file(checked: Callable[..., list[str]], tmp_path: Path, files: dict[str, Any]) -> None:
    assert checked(byte_level_bpe(), **files) == []
    texts, types, ids = in_file(tmp_path)
    assert (texts[501], types[501]) == ("<x>", 3)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for role in ("bos", "eos"):
        assert ids[role] == getattr(tokenizer, f"{role}_token_id")
    assert ids.get("padding") == tokenizer.pad_token_id


def test_added_tokens_json_alone(checked: Callable[..., list[str]], tmp_path: Path) -> None:
    assert checked(byte_level_bpe(), added_tokens={"<x>": 501}) == []
    texts, types, _ = in_file(tmp_path)
    assert (texts[501], types[501]) == ("<x>", 4)


def test_special_tokens_of_the_base_vocabulary_become_special(
    checked: Callable[..., list[str]], tmp_path: Path
) -> None:
    content = json.loads(byte_level_bpe().to_str())
    content["added_tokens"] = content["added_tokens"][3:]
    assert checked(Tokenizer.from_str(json.dumps(content))) == []
    assert in_file(tmp_path)[1][:4] == [1, 3, 3, 1]


def test_a_token_that_only_a_class_makes_special_may_be_plain(
    checked: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Gemma's class makes <mask> special, and its published files say that it is plain."""
    tokenizer = byte_level_bpe()
    tokenizer.add_tokens([AddedToken("<mask>", normalized=False)])
    assert checked(tokenizer) == []
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    loaded.add_special_tokens({"mask_token": "<mask>"})
    arguments = (read_vocabulary(tmp_path), {"bos": 1, "eos": 2}, loaded, tmp_path, ROWS)
    assert not any("plain ones" in fault for fault in vocabulary_faults(*arguments))
    write_json(tmp_path / "special_tokens_map.json", NAMES | {"mask_token": "<mask>"})
    assert any("plain ones" in fault for fault in vocabulary_faults(*arguments))


def test_end_of_text_beyond_the_embedding_is_refused(checked: Callable[..., list[str]]) -> None:
    with pytest.raises(UserError, match=r"'<x>', has the id 501, and the embedding has 501 rows"):
        checked(byte_level_bpe(), rows=501, tokenizer_config=NAMES | {"eos_token": "<x>"})


def test_tokens_beyond_the_embedding_are_said(checked: Callable[..., list[str]]) -> None:
    (sentence,) = checked(byte_level_bpe(), rows=490)
    assert sentence.startswith("11 tokens of the tokenizer, from")


def test_ids_that_transformers_changes_are_refused(checked: Callable[..., list[str]]) -> None:
    decoder = {"added_tokens_decoder": {"505": {"content": "<x>", "special": True}}}
    with pytest.raises(UserError, match="2 tokens have other texts than in the tokenizer, the first being 501"):
        checked(byte_level_bpe(), tokenizer_config=NAMES | decoder)


def test_two_tokens_with_one_text_are_refused(checked: Callable[..., list[str]]) -> None:
    content = json.loads(byte_level_bpe().to_str())
    content["added_tokens"].append(content["added_tokens"][-1] | {"id": 501})
    vocabulary = Tokenizer.from_str(json.dumps(content))
    with pytest.raises(UserError, match=r"two tokens|same text|other texts"):
        checked(vocabulary, added_tokens={"<tool>": 505, "</tool>": 501, "<tool> ": 503})


def test_a_folder_without_a_tokenizer_is_said(smaller_model: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((smaller_model / name).read_bytes())
    (sentence,) = said_before_work(HuggingFaceSource(tmp_path, "model"))
    assert "has no tokenizer" in sentence


# Folders without a tokenizer.json.


def model_of(smaller_model: Path, folder: Path, **names: str) -> HuggingFaceSource:
    """Writes the model beside its tokenizer's files, with a tokenizer_config.json of these names."""
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((smaller_model / name).read_bytes())
    write_json(folder / "tokenizer_config.json", NAMES | names)
    return HuggingFaceSource(folder, "model")


def test_vocab_json_with_merges_txt(smaller_model: Path, tmp_path: Path) -> None:
    byte_level_bpe(bos=False).model.save(str(tmp_path))
    source = model_of(smaller_model, tmp_path, tokenizer_class="GPT2Tokenizer")
    assert said_before_work(source) == []
    (tmp_path / "copy").mkdir()
    source.copy_model_files(tmp_path / "copy")
    write_vocabulary(tmp_path / "copy", tmp_path / "vocabulary.gguf", ROWS)
    assert read_header(tmp_path / "vocabulary.gguf")[0]["tokenizer.ggml.pre"] == "gpt-2"


def test_tokenizer_model_alone(smaller_model: Path, tmp_path: Path) -> None:
    """transformers reads it with protobuf, which lqexport does not need."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(training_text()[:1500]),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    source = model_of(smaller_model, tmp_path, tokenizer_class="LlamaTokenizer")
    assert said_before_work(source) == []
    tokenizer, model = source.tokenizer(), sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    for text in ("Hello  world", "a = b[1]\n  # c"):
        assert tokenizer(text).input_ids == [1, *model.encode(text)]


# Splits in llama.cpp.


@pytest.mark.llamacpp
def test_what_llamacpp_splits_otherwise_is_said(checked: Callable[..., list[str]]) -> None:
    tokenizer = byte_level_bpe()
    tokenizer.normalizer = normalizers.NFC()
    (sentence,) = checked(tokenizer)
    assert "hard texts" in sentence
    assert "'cafe\\u0301" in sentence or "'cafe\u0301" in sentence


@pytest.mark.llamacpp
def test_spaces_that_added_tokens_swallow_are_said(checked: Callable[..., list[str]]) -> None:
    tokenizer = byte_level_bpe()
    tokenizer.add_tokens([AddedToken("<swallow>", rstrip=True, normalized=False)])
    (sentence,) = checked(tokenizer)
    assert "'one<swallow>two <swallow> three" in sentence


@pytest.mark.llamacpp
def test_added_tokens_that_overlap_are_said(checked: Callable[..., list[str]]) -> None:
    tokenizer = byte_level_bpe()
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<ab>", "<ab", "b>cd<")])
    (sentence,) = checked(tokenizer)
    assert "'one<ab>cd<two'" in sentence


@pytest.mark.llamacpp
def test_a_splitter_that_does_something_else_is_refused(checked: Callable[..., list[str]]) -> None:
    with pytest.raises(UserError, match=r"llama\.cpp would split .* into the tokens"):
        checked(byte_level_bpe(), tokenizer_config=NAMES | {"tokenizer.ggml.pre": "superbpe"})
    with pytest.raises(UserError, match="unknown pre-tokenizer type: 'no-such'"):
        checked(byte_level_bpe(), tokenizer_config=NAMES | {"tokenizer.ggml.pre": "no-such"})


@pytest.mark.llamacpp
def test_combining_marks_of_tekken_are_said(checked: Callable[..., list[str]]) -> None:
    tekken = splitter_named("tekken")
    assert tekken is not None
    split = pre_tokenizers.Split(Regex(tekken.expressions[0]), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = byte_level_bpe(pre_tokenizers.Sequence([split, byte_level]), ignore_merges=True)
    assert all("hard texts" in sentence for sentence in checked(tokenizer))


def test_ends_of_words_are_refused(checked: Callable[..., list[str]]) -> None:
    content = json.loads(byte_level_bpe().to_str())
    content["model"]["end_of_word_suffix"] = "</w>"
    with pytest.raises(UserError, match="end_of_word_suffix"):
        checked(Tokenizer.from_str(json.dumps(content)))


def test_ends_by_robertas_post_processor(checked: Callable[..., list[str]], tmp_path: Path) -> None:
    tokenizer = byte_level_bpe()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1))
    assert checked(tokenizer) == []
    write_vocabulary(tmp_path, tmp_path / "vocabulary.gguf", ROWS)
    metadata = read_header(tmp_path / "vocabulary.gguf")[0]
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_eos_token"] is True
