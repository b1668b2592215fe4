"""GGUF files, written and read back: bytes, config, metadata, and the logits that llama.cpp computes."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_files import TOKENS, byte_level_bpe, export, make_artifact, make_model, reference_logits
from llama_files import tokenizer as tokenizer
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from lqexport.converters.gguf import writer as gguf_writer
from lqexport.converters.gguf.reader import GGUFModel
from lqexport.errors import UserError
from lqexport.evaluation.llamacpp import LlamaCpp
from lqexport.formats.codec import Grid
from lqexport.formats.registry import codec_named, names
from lqexport.storage.artifact import StoredTensor
from lqexport.storage.files import write_json


def check_logits(path: Path, model: LlamaForCausalLM, tolerance: float) -> None:
    """Asserts that llama.cpp's logits of the file are those of the model, to a mean absolute error of `tolerance`."""
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
    gguf_writer.write(artifact, tmp_path / "model.gguf", on_tensor=sizes.__setitem__)
    file = GGUFModel(tmp_path / "model.gguf")
    assert file.names() == list(artifact.manifest()) == list(sizes)
    for tensor_name in file.names():
        stored = artifact.read(tensor_name)
        codec_name, planes, shape = file.planes(tensor_name)
        assert (codec_name, shape) == (stored.codec_name, stored.shape)
        assert planes.keys() == stored.planes.keys()
        assert all(np.array_equal(planes[key], stored.planes[key]) for key in planes)
        decoded = codec_named(codec_name).decode(stored.planes, shape[-1]).reshape(shape)
        assert np.array_equal(file.read(tensor_name), decoded)
        assert sizes[tensor_name] == sum(plane.nbytes for plane in stored.planes.values())


@pytest.mark.llamacpp
@pytest.mark.parametrize("gguf_type", [
    "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K", "MXFP4", "NVFP4", "TQ1_0", "TQ2_0", "Q1_0",
])  # fmt: skip
def test_llamacpp_sees_the_weights_that_we_read(tmp_path: Path, gguf_type: str) -> None:
    """llama.cpp rounds activations to 8 bits, so its logits are only near ours. Rows in the wrong order are far off."""
    model = make_model(hidden_size=256, intermediate_size=256, attention_bias=True)
    path = export(tmp_path, model, f"gguf:{gguf_type}", byte_level_bpe())
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
    gguf_writer.write(artifact, tmp_path / "model.gguf")
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
        for template in ("tool_use", "rag", "other"):
            (artifact.model_folder / f"additional_chat_templates/{template}.jinja").write_text(template)
        gguf_writer.write(artifact, folder / "model.gguf")
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


# Models and artifacts that are refused.


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
        gguf_writer.write(artifact, tmp_path / "model.gguf")


def test_native_artifact_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = make_model()
    artifact = make_artifact(tmp_path / "artifact", model, "gguf:F16", tokenizer)
    name = "model.layers.0.mlp.up_proj.weight"
    table = np.sort(np.random.default_rng(0).normal(size=(96, 8)).astype(np.float16), axis=1).astype(np.float32)
    planes = codec_named("native:table-3").encode(Grid(64, table), np.zeros((96, 64), dtype=np.uint8))
    artifact.write(StoredTensor(name, "native:table-3", (96, 64), planes))
    artifact.finish(list(artifact.manifest()), {})
    with pytest.raises(UserError, match=r"1 of its tensors .*native:table-3"):
        gguf_writer.write(artifact, tmp_path / "model.gguf")


def test_damaged_tensor_leaves_no_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    artifact = make_artifact(tmp_path / "artifact", make_model(), "gguf:F16", tokenizer)
    stored = artifact.read("model.layers.1.mlp.down_proj.weight")
    stored.planes["blocks"][3, 5] ^= 1
    artifact.write(stored)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj\.weight .* damaged"):
        gguf_writer.write(artifact, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_unfinished_artifact(tmp_path: Path, tokenizer: Tokenizer) -> None:
    artifact = make_artifact(tmp_path / "artifact", make_model(), "gguf:F16", tokenizer)
    (artifact.folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        gguf_writer.write(artifact, tmp_path / "model.gguf")


def test_small_disk_is_noticed_before_writing(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = make_artifact(tmp_path / "artifact", make_model(), "gguf:F16", tokenizer)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "total used free")(1, 1, 1000))
    with pytest.raises(UserError, match="Free some space"):
        gguf_writer.write(artifact, tmp_path / "new" / "model.gguf")
    assert not (tmp_path / "new").exists()
