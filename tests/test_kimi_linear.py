"""Kimi Linear: published names and keys, and tensors in the forms in which llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from family_cases import export, make_model, make_tokenizer
from rewritten_files import Content, rewritten
from transformers import PreTrainedModel

from lqexport.converters.gguf.reader import GGUFModel
from lqexport.converters.models.architectures import normalized
from lqexport.converters.targets import plan
from lqexport.errors import UserError
from lqexport.models.source import HuggingFaceSource
from lqexport.recipe import Recipe
from lqexport.target import Target

ATTENTION = "model.layers.2.self_attn"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """A model, and a folder with it in `hf`."""
    folder, model = tmp_path_factory.mktemp("kimi"), make_model("kimi-linear")
    model.save_pretrained(folder / "hf")
    make_tokenizer("gpt-2", folder).save_pretrained(folder / "hf")
    return model, folder


def test_names_in_published_checkpoints(saved: tuple[PreTrainedModel, Path]) -> None:
    model, folder = saved
    stored = safetensors.torch.load_file(folder / "hf/model.safetensors")
    assert {f"{ATTENTION}.k_conv1d.weight", f"{ATTENTION}.A_log", f"{ATTENTION}.f_a_proj.weight"} <= stored.keys()
    source, block = HuggingFaceSource(folder / "hf", ""), model.model.layers[2]
    expected = {
        "self_attn.conv1d.k.weight": block.self_attn.conv1d.weight[128:256, 0],
        "self_attn.forget_gate.A_log": block.self_attn.forget_gate.A_log.flatten(),
        "self_attn.forget_gate.f_a_proj.weight": block.self_attn.forget_gate.f_a_proj.weight,
        "mlp.experts.3.up_proj.weight": block.mlp.experts.gate_up_proj[3, 32:],
    }
    for name, tensor in expected.items():
        assert torch.equal(source.read(f"model.layers.2.{name}"), tensor)
        assert source.shape(f"model.layers.2.{name}") == tuple(tensor.shape)


def test_keys_of_published_models(saved: tuple[PreTrainedModel, Path]) -> None:
    config = json.loads((saved[1] / "hf/config.json").read_text())
    new = ("layer_types", "mlp_layer_types", "linear_head_dim", "linear_num_heads", "linear_conv_kernel_dim")
    published = {key: value for key, value in config.items() if key not in new} | {"first_k_dense_replace": 1}
    nested = {"kda_layers": [1, 3], "full_attn_layers": [2], "head_dim": 32, "num_heads": 4}
    published |= {"linear_attn_config": nested | {"short_conv_kernel_size": 4}}
    assert normalized(published) == normalized(config)


def test_forms_of_llamacpps_converter(saved: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    path = export(saved[1], Recipe(str(saved[1] / "hf"), "gguf:F16"))

    def spoil(content: Content) -> None:
        for name, tensor in content.tensors.items():
            if "conv1d" in name:
                content.tensors[name] = tensor.reshape(1, -1, 1, 4)
            if name.endswith("ssm_a"):
                content.tensors[name] = tensor.reshape(1, 1, -1, 1)

    file, other = GGUFModel(path), GGUFModel(rewritten(path, tmp_path / "model.gguf", spoil))
    assert other.names() == file.names()
    for name in (f"{ATTENTION}.conv1d.k.weight", f"{ATTENTION}.forget_gate.A_log"):
        assert np.array_equal(other.read(name), file.read(name))


def test_blocks_of_one_type_are_refused(saved: tuple[PreTrainedModel, Path]) -> None:
    """llama.cpp stops with an assertion."""
    source = HuggingFaceSource(saved[1] / "hf", "")
    shapes = {name: source.shape(name) for name in source.names() if "layers.1." not in name and "layers.2" not in name}
    config = source.config | {"num_hidden_layers": 1, "layer_types": ["linear_attention"], "mlp_layer_types": ["dense"]}
    with pytest.raises(UserError, match="only where some block is 'full_attention'"):
        plan(Target.parse("gguf:F16"), config, shapes)
