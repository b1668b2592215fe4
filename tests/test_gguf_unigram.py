"""SentencePiece's unigram model, and BPE with byte fallback, from tokenizer.model or tokenizer.json into GGUF.

Unmodified llama.cpp must make the same tokens as SentencePiece and transformers.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lqexport.converters.gguf import writer as gguf_writer
from lqexport.converters.gguf.reader import GGUFModel
from lqexport.converters.gguf.sentencepiece_model import read_sentencepiece
from lqexport.converters.gguf.vocabulary import read_vocabulary
from lqexport.errors import UserError
from lqexport.evaluation.llamacpp import LlamaCpp
from lqexport.models.source import open_source
from lqexport.storage.artifact import Artifact
from lqexport.storage.files import write_json

STRINGS: list[str] = json.loads((Path(__file__).parent / "tokenizer_texts.json").read_text(encoding="utf-8"))
WITH_SPECIAL = ("<s>with</s> special<tool>tokens", "a <tool> b<tool>", "<s> x")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that trains a SentencePiece unigram model of some 400 tokens, given options of its trainer."""
    text = [*inspect.getsource(argparse).splitlines(keepends=True)[:800], *STRINGS[:8] * 3]

    def train(**options: Any) -> Path:
        path = tmp_path_factory.mktemp("unigram") / "tokenizer"
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text),
            model_prefix=str(path),
            model_type="unigram",
            character_coverage=0.98,
            user_defined_symbols=["<tool>"],
            num_threads=1,
            minloglevel=2,
            **{"vocab_size": 400} | options,
        )
        return path.with_suffix(".model")

    return train


LIKE_T5: dict[str, Any] = {"normalization_rule_name": "nmt_nfkc"}
BARE: dict[str, Any] = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
}


@pytest.fixture(scope="module")
def like_t5(trained: Callable[..., Path]) -> Path:
    return trained(**LIKE_T5)


@pytest.fixture
def export(rounded_artifact: Callable[..., Artifact], tmp_path: Path) -> Callable[[], Path]:
    """A function that writes the tiny Llama to GGUF, with the tokenizer files that the test has put into `tmp_path`."""

    def write() -> Path:
        artifact = rounded_artifact(tmp_path / "artifact", "gguf:F16")
        for path in (*artifact.model_folder.glob("tokenizer*"), *artifact.model_folder.glob("special*")):
            path.unlink()
        for path in tmp_path.glob("tokenizer*"):
            (artifact.model_folder / path.name).write_bytes(path.read_bytes())
        return gguf_writer.write(artifact, tmp_path / "model.gguf")[0]

    return write


def converted_tokenizer(path: Path, steps: list[normalizers.Normalizer], prefix: str) -> Tokenizer:
    """Returns the tokenizer that transformers makes of a unigram tokenizer.model."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(len(model))]
    tokenizer = Tokenizer(models.Unigram(pieces, model.unk_id(), byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(steps) if steps else None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=prefix)
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme=prefix)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


def t5_steps(path: Path) -> list[normalizers.Normalizer]:
    """Returns the normalizer steps that transformers gives T5's tokenizer."""
    spaces = [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]
    return [normalizers.Precompiled(read_sentencepiece(path).charsmap), *spaces]


@pytest.mark.llamacpp
@pytest.mark.parametrize("options", [LIKE_T5, BARE, BARE | {"add_dummy_prefix": True}], ids=["t5", "bare", "prefix"])
def test_tokenizer_model(
    trained: Callable[..., Path], export: Callable[[], Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    path = trained(**options)
    (tmp_path / "tokenizer.model").write_bytes(path.read_bytes())
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    file = export()
    assert GGUFModel(file).metadata["tokenizer.ggml.model"] == "t5"
    with LlamaCpp(file, 32, threads=1) as engine:
        for text in STRINGS:
            if text != " " or options != BARE | {"add_dummy_prefix": True}:  # a known difference: gguf/spaces.py
                assert engine.tokenize(text) == model.encode(text), text


@pytest.mark.llamacpp
@pytest.mark.parametrize("form", ["t5", "bare"])
def test_tokenizer_json(
    trained: Callable[..., Path], export: Callable[[], Path], tmp_path: Path, like_t5: Path, form: str
) -> None:
    if form == "t5":
        tokenizer = converted_tokenizer(like_t5, t5_steps(like_t5), "always")
    else:
        tokenizer = converted_tokenizer(trained(**BARE), [], "never")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.save_pretrained(tmp_path)
    with LlamaCpp(export(), 32, threads=1) as engine:
        for text in (*STRINGS, *WITH_SPECIAL):
            assert engine.tokenize(text) == fast(text, add_special_tokens=False).input_ids, text
        assert engine.logits([1, 5, 7]).shape == (3, 512)


def test_metadata(export: Callable[[], Path], tmp_path: Path, like_t5: Path) -> None:
    converted_tokenizer(like_t5, t5_steps(like_t5), "always").save(str(tmp_path / "tokenizer.json"))
    file = export()
    metadata, model = GGUFModel(file).metadata, read_sentencepiece(like_t5)
    assert bytes(metadata["tokenizer.ggml.precompiled_charsmap"]) == model.charsmap
    assert len(model.charsmap) > 1000
    assert metadata["tokenizer.ggml.remove_extra_whitespaces"] is True
    assert metadata["tokenizer.ggml.add_space_prefix"] is True
    assert metadata["tokenizer.ggml.add_eos_token"] is False
    assert metadata["tokenizer.ggml.unknown_token_id"] == 0
    assert metadata["tokenizer.ggml.token_type"][0] == TokenType.UNKNOWN
    assert metadata["tokenizer.ggml.scores"][10:] == [piece.score for piece in model.pieces[10:]] + [-1000.0] * 112
    assert open_source(str(file)).tokenizer().unk_token_id == 0


def check_refused(folder: Path, tokenizer: dict[str, Any], message: str) -> None:
    """Asserts that a folder with this tokenizer.json is refused with this message."""
    write_json(folder / "tokenizer.json", tokenizer)
    with pytest.raises(UserError, match=message):
        read_vocabulary(folder)


def test_unigrams_that_llamacpp_splits_otherwise(tmp_path: Path, like_t5: Path, trained: Callable[..., Path]) -> None:
    good = json.loads(converted_tokenizer(like_t5, t5_steps(like_t5), "always").to_str())
    write_json(tmp_path / "tokenizer.json", good)
    assert read_vocabulary(tmp_path).merge_spaces
    model, steps = good["model"], good["normalizer"]["normalizers"]
    check_refused(tmp_path, good | {"model": model | {"unk_id": None}}, "without an unknown token")
    check_refused(tmp_path, good | {"model": model | {"vocab": [*model["vocab"], ["<0x0A>", 0.0]]}}, "tokens for bytes")
    check_refused(tmp_path, good | {"normalizer": {"type": "Lowercase"}}, r"does not \(Lowercase, Metaspace\)")
    check_refused(tmp_path, good | {"normalizer": {"type": "Sequence", "normalizers": steps[:2]}}, "Strip, Metaspace")
    check_refused(tmp_path, good | {"pre_tokenizer": {"type": "WhitespaceSplit"}}, "WhitespaceSplit")
    check_refused(
        tmp_path, good | {"pre_tokenizer": good["pre_tokenizer"] | {"prepend_scheme": "never"}}, "puts none before"
    )
    broken = [{"type": "Precompiled", "precompiled_charsmap": "%"}, *steps[1:]]
    check_refused(tmp_path, good | {"normalizer": {"type": "Sequence", "normalizers": broken}}, "not base64")
    (tmp_path / "tokenizer.json").unlink()
    for options, message in (
        ({"byte_fallback": True, "vocab_size": 500}, "tokens for bytes"),
        ({"treat_whitespace_as_suffix": True}, "puts spaces where"),
        ({"add_dummy_prefix": False}, "puts spaces where"),
    ):
        (tmp_path / "tokenizer.model").write_bytes(trained(**options).read_bytes())
        with pytest.raises(UserError, match=message):
            read_vocabulary(tmp_path)


# BPE with byte fallback that comes as tokenizer.json only (tests/test_families.py tests those with a tokenizer.model).


def trained_bpe() -> dict[str, Any]:
    """Returns the tokenizer.json of a BPE with byte fallback as `tokenizers` trains it: each token has one merge."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", *byte_tokens], show_progress=False)
    tokenizer.train_from_iterator(inspect.getsource(argparse).split()[:3000], trainer)
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    return content | {"added_tokens": content["added_tokens"][:1]}


def test_bpe_that_is_not_sentencepieces(tmp_path: Path) -> None:
    check_refused(tmp_path, trained_bpe(), "not made from a SentencePiece model")


@pytest.mark.parametrize("step", [{"type": "NFKC"}, {"type": "Strip", "strip_left": True, "strip_right": True}])
def test_bpe_that_changes_text(tmp_path: Path, step: dict[str, Any]) -> None:
    vocabulary = {"type": "BPE", "vocab": {"<unk>": 0, "a": 1}, "merges": [], "byte_fallback": True}
    check_refused(tmp_path, {"model": vocabulary, "normalizer": step}, str(step["type"]))
