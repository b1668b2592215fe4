"""A .gguf source: what its metadata says is in the exported file, and its tokenizer splits as llama.cpp does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from llama_files import STRINGS, byte_level_bpe, export, make_artifact, make_model, training_text

import lqexport
from lqexport.converters.gguf import writer as gguf_writer
from lqexport.converters.gguf.header import read_typed
from lqexport.converters.gguf.pretokenizers import SPLITTERS
from lqexport.converters.gguf.reader import GGUFModel
from lqexport.evaluation.llamacpp import LlamaCpp
from lqexport.models.source import GGUFSource, open_source
from lqexport.models.source_view import SourceView
from lqexport.verification.splits import different_splits
from lqexport.verification.verify_vocabulary import vocabulary_differences

STRING, NUMBER, FLAG, ARRAY = GGUFValueType.STRING, GGUFValueType.UINT32, GGUFValueType.BOOL, GGUFValueType.ARRAY
TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
SAID: dict[str, tuple[Any, GGUFValueType]] = {
    "general.name": ("Tiny Llama Q4_1", STRING),
    "general.organization": ("Some Lab", STRING),
    "general.basename": ("tiny", STRING),
    "general.license": ("apache-2.0", STRING),
    "general.languages": (["en", "de"], ARRAY),
    "general.tags": (["chat"], ARRAY),
    "general.base_model.count": (1, NUMBER),
    "general.base_model.0.name": ("Big Llama", STRING),
    "general.sampling.temp": (0.7, GGUFValueType.FLOAT32),
    "general.quantized_by": ("somebody", STRING),
    "llama.attention.scale": (0.25, GGUFValueType.FLOAT32),
    "quantize.imatrix.file": ("a.imatrix", STRING),
    "tokenizer.ggml.pre": ("starcoder", STRING),
    "tokenizer.ggml.add_bos_token": (False, FLAG),
    "tokenizer.ggml.eot_token_id": (7, NUMBER),
    "tokenizer.chat_template": (TEMPLATE, STRING),
    "tokenizer.chat_template.rag": ("{{ documents }}", STRING),
    "tokenizer.chat_templates": (["rag"], ARRAY),
    "tokenizer.ggml.somewhat_new": (1 << 40, GGUFValueType.UINT64),
}
CHANGED = {"general.name", "general.file_type"}
LEFT_OUT = {"general.quantized_by", "quantize.imatrix.file", "lqexport.calibration"}


def rewritten(path: Path, to: Path, said: dict[str, tuple[Any, GGUFValueType]]) -> Path:
    """Writes the GGUF file `path` again, with other values in its metadata."""
    writer = GGUFWriter(to, "llama")
    for key, (value, type_code, element) in read_typed(path).items():
        if key not in said and key != "general.architecture":
            writer.add_key_value(key, value, GGUFValueType(type_code), element and GGUFValueType(element))
    for key, (value, value_type) in said.items():
        writer.add_key_value(key, value, value_type, STRING if value_type is ARRAY else None)
    for tensor in GGUFReader(path).tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of a random Llama whose metadata says more than this program would."""
    folder = tmp_path_factory.mktemp("said")
    return rewritten(export(folder, make_model(), "gguf:F16", byte_level_bpe()), folder / "said-Q4_1.gguf", SAID)


@pytest.fixture(scope="module")
def again(source: Path) -> Path:
    """The file that a run on `source` ends with."""
    recipe = lqexport.Recipe(str(source), "gguf:Q8_0", method="rtn")
    lqexport.quantize(recipe, source.parent / "out", device="cpu")
    return Path(lqexport.export(source.parent / "out", source.parent / "again.gguf"))


def test_every_key_of_the_source_is_in_the_file(source: Path, again: Path) -> None:
    old, new = read_typed(source), read_typed(again)
    different = {key for key in old if new.get(key) != old[key]}
    assert different == CHANGED | LEFT_OUT | {"lqexport.recipe"}
    assert LEFT_OUT & new.keys() == set()
    assert new["general.name"].value == "Tiny Llama"
    assert (source.parent / "out/model/source-metadata.gguf").is_file()


def test_a_file_without_a_name_gives_its_own_without_the_type(source: Path, tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "artifact", make_model(), "gguf:F16", byte_level_bpe())
    run = json.loads((artifact.folder / "run.json").read_text())
    for name, expected in (("a/some-Q4_K_M.gguf", "some"), ("a/some.BF16.gguf", "some"), ("a/some-F16", "some-F16")):
        run["recipe"]["source"] = name
        (artifact.folder / "run.json").write_text(json.dumps(run))
        gguf_writer.write(artifact, tmp_path / "model.gguf")
        assert read_typed(tmp_path / "model.gguf")["general.name"].value == expected


@pytest.mark.llamacpp
def test_verified_against_its_source_in_llamacpp(source: Path, again: Path) -> None:
    result = lqexport.verify(source, str(source), engine="llama.cpp", windows=1, max_over_expected=None, device="cpu")
    assert result.failed == []
    assert not [warning for warning in result.warnings if "splits" in warning]
    assert lqexport.verify(again, str(source), engine="llama.cpp", windows=1, device="cpu").failed == []


def test_verify_compares_the_keys_of_the_tokenizer(source: Path, again: Path, tmp_path: Path) -> None:
    changed = rewritten(again, tmp_path / "a.gguf", {"tokenizer.ggml.eos_token_id": (3, NUMBER)})
    sentences = vocabulary_differences(GGUFModel(changed), GGUFSource(source))
    assert sentences == ["tokenizer.ggml.eos_token_id is 3, and the source has 2."]
    assert vocabulary_differences(GGUFModel(changed), SourceView(GGUFSource(source))) == sentences


def test_verify_compares_the_vocabulary_with_the_tokenizer(smaller_model: Path, tmp_path: Path) -> None:
    source = open_source(str(smaller_model))
    recipe = lqexport.Recipe(str(smaller_model), "gguf:Q8_0", method="rtn")
    lqexport.quantize(recipe, tmp_path / "out", device="cpu")
    file = Path(lqexport.export(tmp_path / "out", tmp_path / "model.gguf"))
    assert vocabulary_differences(GGUFModel(file), source) == []
    typed = read_typed(file)
    tokens, types = typed["tokenizer.ggml.tokens"].value, typed["tokenizer.ggml.token_type"].value
    for key, (value, value_type), sentence in (
        ("tokens", ([*tokens[:5], "never", *tokens[6:]], ARRAY), "1 tokens have other texts"),
        ("tokens", ([tokens[1], tokens[0], *tokens[2:]], ARRAY), "2 tokens have other texts"),
        ("bos_token_id", (3, NUMBER), "The bos token is 3"),
        ("add_bos_token", (True, FLAG), "puts a BOS before a text"),
    ):
        said = {f"tokenizer.ggml.{key}": (value, value_type)}
        (fault,) = vocabulary_differences(GGUFModel(rewritten(file, tmp_path / "a.gguf", said)), source)
        assert sentence in fault
    assert types[0] == 3
    other = GGUFModel(rewritten(file, tmp_path / "a.gguf", {"tokenizer.ggml.pre": ("bloom", STRING)}))
    (sentence,) = different_splits(other, source)
    assert "tokenizer.ggml.pre is 'bloom'" in sentence
    assert different_splits(other, SourceView(source)) == [sentence]


def test_folders_of_other_formats_have_no_copy_of_the_metadata(source: Path, tmp_path: Path) -> None:
    recipe = lqexport.Recipe(str(source), "native:affine-4-g32", method="rtn")
    lqexport.quantize(recipe, tmp_path / "out", device="cpu")
    folder = Path(lqexport.export(tmp_path / "out", tmp_path / "native"))
    assert (folder / "tokenizer.json").is_file()
    assert not (folder / "source-metadata.gguf").exists()


# The tokenizer that transformers makes of the metadata.


@pytest.mark.llamacpp
@pytest.mark.parametrize("name", ["smollm", "llama-bpe", "deepseek-llm"])
def test_tokenizer_of_a_gguf_file_splits_as_llamacpp_does(source: Path, tmp_path: Path, name: str) -> None:
    check_tokenizer(rewritten(source, tmp_path / "a.gguf", {"tokenizer.ggml.pre": (name, STRING)}))


def check_tokenizer(path: Path) -> None:
    tokenizer = open_source(str(path)).tokenizer()
    with LlamaCpp(path, 32, part="vocabulary") as engine:
        for text in (*STRINGS, "<s>with</s> special<tool>tokens"):
            assert engine.tokenize(text) == tokenizer(text, add_special_tokens=False).input_ids, text


def test_special_tokens_of_a_gguf_file(source: Path, tmp_path: Path) -> None:
    tokenizer = open_source(str(source)).tokenizer()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 512)
    alone = tokenizer("a", add_special_tokens=False).input_ids
    assert tokenizer("a").input_ids == alone
    flags = {f"tokenizer.ggml.add_{end}_token": (True, FLAG) for end in ("bos", "eos")}
    assert open_source(str(rewritten(source, tmp_path / "a.gguf", flags))).tokenizer()("a").input_ids == [1, *alone, 2]


@pytest.mark.llamacpp
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece_tokenizer_of_a_gguf_file(tmp_path: Path, model_type: str) -> None:
    form = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    artifact = make_artifact(tmp_path / "artifact", make_model(), "gguf:F16", None)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(training_text()[:1500]),
        model_prefix=str(artifact.model_folder / "tokenizer"),
        model_type=model_type,
        vocab_size=400,
        character_coverage=0.98,
        user_defined_symbols=["<tool>"],
        num_threads=1,
        minloglevel=2,
        **(form if model_type == "bpe" else {"normalization_rule_name": "nmt_nfkc"}),
    )
    gguf_writer.write(artifact, tmp_path / "model.gguf")
    check_tokenizer(tmp_path / "model.gguf")


def test_every_splitter_of_llamacpp_has_one_entry() -> None:
    names = [name for splitter in SPLITTERS for name in splitter.names]
    assert len(names) == len(set(names))
