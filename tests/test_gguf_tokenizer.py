"""Tokenizers in GGUF files: vocabulary, word splitter, special tokens and chat templates, compared with llama.cpp."""

from __future__ import annotations

import ctypes
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from gguf import GGUFReader, TokenType
from llama_files import STRINGS, byte_level_bpe, export, make_artifact, make_model, training_text
from llama_files import tokenizer as tokenizer
from planned_files import said_before_work
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lqexport.converters.gguf import writer as gguf_writer
from lqexport.converters.gguf.pretokenizers import SPLITTERS, Splitter, pretokenizer_name, splitter_named
from lqexport.converters.gguf.reader import GGUFModel
from lqexport.converters.gguf.spaces import space_rules
from lqexport.converters.gguf.tokenizer import (
    added_ends,
    chat_templates,
    name_for_llamacpp,
    special_ids,
    stop_ids,
    write_vocabulary,
)
from lqexport.converters.gguf.vocabulary import read_vocabulary
from lqexport.errors import UserError
from lqexport.evaluation.llamacpp import LlamaCpp
from lqexport.models.source import HuggingFaceSource, open_source
from lqexport.storage.files import write_json


@pytest.mark.parametrize("bos", [True, False])
def test_byte_level_vocabulary(tmp_path: Path, bos: bool) -> None:
    tokenizer = byte_level_bpe(bos=bos)
    metadata = GGUFModel(export(tmp_path, make_model(), "gguf:F16", tokenizer)).metadata
    tokens, token_types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    count = tokenizer.get_vocab_size()
    assert tokens[:count] == [tokenizer.id_to_token(i) for i in range(count)]
    assert tokens[count:] == [f"[PAD{i}]" for i in range(count, 512)]
    assert len(tokens) == len(token_types) == 512
    assert token_types[:3] == [TokenType.CONTROL] * 3
    assert token_types[count - 1 :] == [TokenType.USER_DEFINED] + [TokenType.UNUSED] * (512 - count)
    assert set(token_types[3 : count - 1]) == {TokenType.NORMAL}
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert metadata["tokenizer.ggml.add_bos_token"] is bos
    assert metadata["tokenizer.ggml.add_eos_token"] is False
    assert (metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]) == (1, 2)


def splitter_of(expressions: tuple[str, ...]) -> Any:
    """Returns a pre-tokenizer that splits text by the expressions one after the other."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
    return pre_tokenizers.Sequence([*splits, byte_level])


@pytest.mark.llamacpp
@pytest.mark.parametrize("splitter", SPLITTERS, ids=[splitter.names[0] for splitter in SPLITTERS])
def test_llamacpp_splits_words_as_we_claim(tmp_path: Path, splitter: Splitter) -> None:
    tokenizer = byte_level_bpe(splitter_of(splitter.expressions), ignore_merges=splitter.ignore_merges)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for name in splitter.names:
        write_json(tmp_path / "tokenizer_config.json", {"bos_token": "<s>", "tokenizer.ggml.pre": name})
        write_vocabulary(tmp_path, tmp_path / "model.gguf", tokenizer.get_vocab_size())
        check_tokens(tmp_path / "model.gguf", tokenizer)
    assert splitter_named(pretokenizer_name(json.loads(tokenizer.to_str()))).expressions == splitter.expressions


def check_tokens(path: Path, tokenizer: Tokenizer) -> None:
    """Asserts that llama.cpp, with the GGUF file, makes the same tokens of test strings as the tokenizer."""
    with LlamaCpp(path, 32, part="vocabulary") as engine:
        for text in (*STRINGS, "<s>with</s> special<tool>tokens"):
            assert engine.tokenize(text) == tokenizer.encode(text, add_special_tokens=False).ids, text


def test_other_spellings_of_a_splitter() -> None:
    digits = {"type": "Digits", "individual_digits": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    smollm = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]}, "model": {}}
    assert pretokenizer_name(smollm) == "smollm"

    def of_splits(expressions: tuple[str, ...], **options: Any) -> dict[str, Any]:
        form = {"type": "Split", "behavior": "Isolated"} | options
        splits = [form | {"pattern": {"Regex": expression}} for expression in expressions]
        return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": splits}, "model": {}}

    known = {splitter.names[0]: splitter.expressions for splitter in SPLITTERS}
    assert pretokenizer_name(of_splits(known["qwen2"], behavior="Removed", invert=True)) == "qwen2"
    with_characters = tuple(part.replace(r"\r\n", "\r\n") for part in known["deepseek-v3"])
    assert with_characters != known["deepseek-v3"]
    assert pretokenizer_name(of_splits(with_characters)) == "deepseek-v3"
    possessive = known["bailingmoe"][0].replace("]?", "]?+").replace("{N}]+[", "{N}]++[")
    assert pretokenizer_name(of_splits((possessive,))) == "bailingmoe"
    gpt4o = of_splits(known["gpt-4o"]) | {"model": {"ignore_merges": True}}  # as gpt-oss has it
    assert pretokenizer_name(gpt4o) == "gpt-4o"


def test_unknown_splitter_says_what_to_do_and_can_be_named(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "a", make_model(), "gguf:F16", byte_level_bpe(splitter_of((r"\w+|\W",))))
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.pre"):
        gguf_writer.write(artifact, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf*"))
    write_json(artifact.model_folder / "tokenizer_config.json", {"tokenizer.ggml.pre": "superbpe"})
    gguf_writer.write(artifact, tmp_path / "model.gguf")
    assert GGUFModel(tmp_path / "model.gguf").metadata["tokenizer.ggml.pre"] == "superbpe"


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text.txt").write_text("".join(training_text()), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        character_coverage=0.99,
        user_defined_symbols=["<tool>"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.mark.llamacpp
def test_sentencepiece_model(tmp_path: Path, sentencepiece_file: Path) -> None:
    artifact = make_artifact(tmp_path / "artifact", make_model(), "gguf:F16", None)
    shutil.copy(sentencepiece_file, artifact.model_folder / "tokenizer.model")
    gguf_writer.write(artifact, tmp_path / "model.gguf")
    metadata = GGUFModel(tmp_path / "model.gguf").metadata
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    assert metadata["tokenizer.ggml.tokens"][:500] == [model.id_to_piece(i) for i in range(500)]
    assert metadata["tokenizer.ggml.scores"][:500] == [model.get_score(i) for i in range(500)]
    token_types = metadata["tokenizer.ggml.token_type"]
    assert token_types[:5] == [TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, TokenType.USER_DEFINED, TokenType.BYTE]
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_space_prefix"] is True
    with LlamaCpp(tmp_path / "model.gguf", 32) as engine:
        for text in STRINGS:
            assert engine.tokenize(text) == model.encode(text), text


def like_llama_2(path: Path) -> Tokenizer:
    """Returns the tokenizer that transformers makes of a tokenizer.model: merges are in the order of the scores."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = {model.id_to_piece(i): i for i in range(len(model))}
    merges = []
    for piece in sorted((p for p in ids if p != "<tool>"), key=lambda p: -model.get_score(ids[p])):
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs = [(left, right) for left, right in cuts if left in ids and right in ids]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.ByteFallback()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.mark.llamacpp
def test_sentencepiece_as_tokenizer_json(tmp_path: Path, sentencepiece_file: Path) -> None:
    tokenizer = like_llama_2(sentencepiece_file)
    path = export(tmp_path, make_model(), "gguf:F16", tokenizer)
    metadata = GGUFModel(path).metadata
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] is True
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.token_type"][0] == TokenType.UNKNOWN
    assert metadata["tokenizer.ggml.token_type"][4:260] == [TokenType.BYTE] * 256
    with LlamaCpp(path, 32) as engine:
        for text in STRINGS:
            assert engine.tokenize(text) == tokenizer.encode(text, add_special_tokens=False).ids, text


@pytest.mark.llamacpp
def test_tokenizer_json_counts_where_its_class_changes_it(
    smaller_model: Path, tmp_path: Path, sentencepiece_file: Path
) -> None:
    """transformers' class of Llama 2 puts no space before a text that begins with one; its tokenizer.json does."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(smaller_model / name, tmp_path)
    tokenizer = like_llama_2(sentencepiece_file)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", **names})
    source = HuggingFaceSource(tmp_path, "llama")
    alone = tokenizer.encode(" two  spaces", add_special_tokens=False).ids
    assert source.tokenizer()(" two  spaces", add_special_tokens=False).input_ids != alone
    assert not [sentence for sentence in said_before_work(source) if "' two" in sentence or "'   " in sentence]


def test_added_tokens_beyond_the_embedding_are_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = make_model(vocab_size=tokenizer.get_vocab_size() - 1)
    tokens = GGUFModel(export(tmp_path, model, "gguf:F16", tokenizer)).metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == model.config.vocab_size
    assert "<tool>" not in tokens


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_special_tokens(folder: Path) -> None:
    vocabulary = read_vocabulary(folder)
    write_json(folder / "config.json", {"bos_token_id": 7, "eos_token_id": [9, 2], "pad_token_id": None})
    write_json(folder / "generation_config.json", {"bos_token_id": 8, "pad_token_id": 5})
    assert special_ids(folder, vocabulary) == {"bos": 7, "eos": 9, "pad": 5}
    write_json(folder / "special_tokens_map.json", {"bos_token": {"content": "<s>"}, "unk_token": "<unk>"})
    write_json(folder / "tokenizer_config.json", {"eos_token": "</s>", "bos_token": "not a token"})
    assert special_ids(folder, vocabulary) == {"bos": 1, "eos": 2, "pad": 5, "unk": 0}


def test_all_stop_tokens_go_into_the_file(tmp_path: Path) -> None:
    """The list of generation_config.json becomes eos, eot and eom; ids of ordinary tokens are no stop tokens."""
    tokenizer = byte_level_bpe()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ("<end>", "<call>")])
    numbers = [tokenizer.token_to_id(text) for text in ("<end>", "</s>", "<call>")]
    artifact = make_artifact(tmp_path / "artifact", make_model(), "gguf:F16", tokenizer)
    write_json(artifact.model_folder / "generation_config.json", {"eos_token_id": [40, *numbers, 9999]})
    gguf_writer.write(artifact, tmp_path / "model.gguf")
    model = GGUFModel(tmp_path / "model.gguf")
    keys = [model.metadata[f"tokenizer.ggml.{role}_token_id"] for role in ("eos", "eot", "eom")]
    assert keys == [numbers[1], numbers[0], numbers[2]]
    assert model.config["eos_token_id"] == keys
    open_source(str(tmp_path / "model.gguf")).copy_model_files(tmp_path / "back")
    assert stop_ids(tmp_path / "back", read_vocabulary(tmp_path / "back")) == keys


def phi3_tokenizer(*, strips: bool, ends: bool = True) -> Tokenizer:
    """Returns a tokenizer with special tokens as Phi-3 has them; without <|endoftext|> if not `ends`."""
    tokenizer = byte_level_bpe(bos=False)
    texts = {"</s>": strips, "<|user|>": strips, "<|end|>": strips} | ({"<|endoftext|>": False} if ends else {})
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, rstrip=strip) for text, strip in texts.items()])
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "name", "written"),
    [
        (phi3_tokenizer(strips=True), "tuned", "tuned (phi-3)"),
        (phi3_tokenizer(strips=True), "Phi-3.5-mini", "Phi-3.5-mini"),
        (phi3_tokenizer(strips=True), "", "(phi-3)"),
        (phi3_tokenizer(strips=False), "tuned", "tuned"),
        (phi3_tokenizer(strips=False), "My-Phi3", "My-Phi 3"),
        (phi3_tokenizer(strips=True, ends=False), "phi-3", "phi 3"),  # llama.cpp would not load it
    ],
)
def test_the_name_makes_llamacpp_strip_as_the_source_does(
    tmp_path: Path, tokenizer: Tokenizer, name: str, written: str
) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert name_for_llamacpp(name, tmp_path) == written


@pytest.mark.llamacpp
@pytest.mark.parametrize("strips", [True, False])
def test_llamacpp_strips_behind_special_tokens_as_the_source_does(tmp_path: Path, strips: bool) -> None:
    tokenizer = phi3_tokenizer(strips=strips)
    with LlamaCpp(export(tmp_path, make_model(), "gguf:F16", tokenizer), 32) as engine:
        for text in ("<|user|>\nHi<|end|>\n<|user|>", "<s> a"):
            assert engine.tokenize(text) == tokenizer.encode(text, add_special_tokens=False).ids


def test_tokenizer_config_decides_about_bos(folder: Path) -> None:
    vocabulary = read_vocabulary(folder)
    assert added_ends(folder, vocabulary) == (True, False)
    write_json(folder / "tokenizer_config.json", {"add_bos_token": False, "add_eos_token": True})
    assert added_ends(folder, vocabulary) == (False, True)


def test_chat_templates(folder: Path) -> None:
    assert chat_templates(folder) == {}
    write_json(folder / "tokenizer_config.json", {"chat_template": "A"})
    assert chat_templates(folder) == {"default": "A"}
    named = [{"name": "default", "template": "B"}, {"name": "tool_use", "template": "C"}]
    write_json(folder / "tokenizer_config.json", {"chat_template": named})
    assert chat_templates(folder) == {"default": "B", "tool_use": "C"}
    write_json(folder / "tokenizer_config.json", {"chat_template": [{"name": "x"}]})
    with pytest.raises(UserError, match="needs a name and a template"):
        chat_templates(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/rag.jinja").write_text("E")
    assert chat_templates(folder) == {"rag": "E"}
    (folder / "chat_template.jinja").write_text("D")
    assert chat_templates(folder) == {"default": "D", "rag": "E"}


TEMPLATES = {"default": "{{ messages }}", "rag": "R", "tool-use": "Zwölf 🙂"}


@pytest.mark.parametrize("as_list", [True, False], ids=["list", "folder"])
def test_named_chat_templates(tmp_path: Path, tokenizer: Tokenizer, as_list: bool) -> None:
    """Reads both forms in which transformers saves chat templates, writes them to GGUF, and reads them back."""
    artifact = make_artifact(tmp_path / "artifact", make_model(), "gguf:F16", tokenizer)
    (artifact.model_folder / "chat_template.jinja").unlink()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATES
    fast.save_pretrained(artifact.model_folder, save_jinja_files=not as_list)
    assert (artifact.model_folder / "additional_chat_templates").is_dir() != as_list
    assert chat_templates(artifact.model_folder) == TEMPLATES
    gguf_writer.write(artifact, tmp_path / "model.gguf")
    fields = GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.chat_templates"].contents() == ["rag", "tool_use"]
    assert fields["tokenizer.chat_template.tool_use"].contents() == TEMPLATES["tool-use"]
    assert fields["tokenizer.chat_template"].contents() == TEMPLATES["default"]
    open_source(str(tmp_path / "model.gguf")).copy_model_files(tmp_path / "back")
    assert chat_templates(tmp_path / "back") == {name.replace("-", "_"): text for name, text in TEMPLATES.items()}


@pytest.mark.llamacpp
def test_llamacpp_finds_chat_templates(tmp_path: Path, tokenizer: Tokenizer) -> None:
    artifact = make_artifact(tmp_path / "artifact", make_model(), "gguf:F16", tokenizer)
    (artifact.model_folder / "additional_chat_templates").mkdir()
    (artifact.model_folder / "additional_chat_templates/tool-use.jinja").write_text(TEMPLATES["tool-use"])
    gguf_writer.write(artifact, tmp_path / "model.gguf")
    with LlamaCpp(tmp_path / "model.gguf", 32) as engine:
        chat_template = engine._llama.llama_model_chat_template
        chat_template.restype, chat_template.argtypes = ctypes.c_char_p, [ctypes.c_void_p, ctypes.c_char_p]
        assert chat_template(engine._model, None).decode() == "{{ messages }}"
        assert chat_template(engine._model, b"tool_use").decode() == TEMPLATES["tool-use"]
        assert chat_template(engine._model, b"other") is None


# Tokenizers that are refused.


def test_tokenizers_that_llamacpp_lacks(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    write_json(folder / "tokenizer.json", content | {"normalizer": {"type": "Lowercase"}})
    with pytest.raises(UserError, match="Lowercase"):
        read_vocabulary(folder)
    steps = [{"type": "Sequence", "normalizers": [{"type": "NFC"}]}, {"type": "Lowercase"}]
    write_json(folder / "tokenizer.json", content | {"normalizer": {"type": "Sequence", "normalizers": steps}})
    with pytest.raises(UserError, match=r"\(Lowercase\)"):
        read_vocabulary(folder)
    write_json(folder / "tokenizer.json", {"model": {"type": "WordPiece", "vocab": {"a": 0}}})
    with pytest.raises(UserError, match="WordPiece"):
        read_vocabulary(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_vocabulary(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer to export"):
        read_vocabulary(folder)


def test_a_normalizer_without_steps_does_nothing(folder: Path) -> None:
    """transformers 5.17 writes such a normalizer."""
    content, expected = json.loads((folder / "tokenizer.json").read_text()), read_vocabulary(folder)
    write_json(folder / "tokenizer.json", content | {"normalizer": {"type": "Sequence", "normalizers": []}})
    assert read_vocabulary(folder) == expected
    assert space_rules({"normalizer": {"type": "Sequence", "normalizers": []}}, unigram=False) == (False, False)


@pytest.mark.parametrize("content", [b"", b"\x00", b"\x0a\xff\xff", b"not a model at all", b"\x0a\x03\x0a\x05abc"])
def test_damaged_sentencepiece_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match="not a SentencePiece model"):
        read_vocabulary(tmp_path)


def test_unigram_sentencepiece_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x03\x0a\x01a" + b"\x12\x02\x18\x01")
    with pytest.raises(UserError, match="unigram model without an unknown token"):
        read_vocabulary(tmp_path)
