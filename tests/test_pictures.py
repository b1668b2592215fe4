"""Image parts as files for llama.cpp: its outputs for an image against transformers', the metadata, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from family_cases import export, make_tokenizer
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from picture_models import CASES, by_llamacpp, by_transformers, image, save
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from lqexport.checking.checking import check_file
from lqexport.cli.app import app
from lqexport.converters.gguf.header import read_header
from lqexport.errors import UserError
from lqexport.models.inspect import inspect
from lqexport.pictures import plan_mmproj, to_mmproj
from lqexport.recipe import Recipe


@pytest.fixture(scope="module")
def text_models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """GGUF files of text models by the number of columns of their inputs, which llama.cpp compares with the image part.

    The deep outputs of Qwen3-VL are further columns.
    """
    folder, files = tmp_path_factory.mktemp("texts"), {}
    for columns in (64, 192):
        sizes = {"vocab_size": 512, "hidden_size": columns, "intermediate_size": 96, "num_hidden_layers": 1}
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
        model.save_pretrained(folder / str(columns) / "hf")
        make_tokenizer("gpt-2", folder).save_pretrained(folder / str(columns) / "hf")
        files[columns] = export(folder / str(columns), Recipe(str(folder / str(columns) / "hf"), "gguf:F16"))
    return files


def without_breaks(name: str, rows: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Returns outputs without the embeddings that end rows of an image, of which the last row has none."""
    if name not in ("pixtral", "mistral3"):
        return rows
    per_row = pixels.shape[1] // (14 if name == "pixtral" else 28)
    return rows[[number for number in range(len(rows)) if (number + 1) % (per_row + 1)]]


@pytest.mark.llamacpp
@pytest.mark.parametrize("name", CASES)
def test_llamacpp_makes_of_an_image_what_transformers_makes(
    name: str, tmp_path: Path, text_models: dict[int, Path]
) -> None:
    """Also in Q8_0. Gemma 4 does not divide products of queries and keys, which makes errors larger."""
    folder, pixels = save(name, tmp_path), image(name)
    expected = by_transformers(name, pixels)
    columns = expected.shape[1]
    for type_name, bound in (("F32", 0.0006), ("Q8_0", 0.03)):
        to_mmproj(folder, tmp_path / f"{type_name}.gguf", type_name=type_name)
        results = by_llamacpp(tmp_path / f"{type_name}.gguf", text_models[columns], columns, pixels)
        assert len(results) == (2 if name in ("smolvlm", "idefics3") else 1)
        for rows in results:
            difference = np.abs(without_breaks(name, rows, pixels) - expected).mean() / np.abs(expected).mean()
            assert difference < bound * (8 if name == "gemma4" else 2)


def test_types_of_tensors(tmp_path: Path) -> None:
    """Convolutions and positions stay in float32. What Q8_0 cannot hold, and what llama.cpp transposes, is in F16."""
    folder = save("gemma3", tmp_path)
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    for type_name in ("F16", "BF16", "Q8_0"):
        to_mmproj(folder, tmp_path / "mmproj.gguf", type_name=type_name)
        metadata, tensors = read_header(tmp_path / "mmproj.gguf")
        types = {name: tensor.tensor_type for name, tensor in tensors.items()}
        assert types["v.patch_embd.weight"] == types["v.position_embd.weight"] == types["v.blk.0.ln1.weight"] == "F32"
        assert types["mm.input_projection.weight"] == "F16"
        assert types["v.blk.1.ffn_up.weight"] == ("F16" if type_name == "Q8_0" else type_name)  # 48 columns
        assert (metadata["general.architecture"], metadata["general.type"]) == ("clip", "mmproj")
        assert metadata["clip.vision.projector.scale_factor"] == 2
        assert metadata["clip.vision.image_std"] == pytest.approx([0.5, 0.6, 0.7])
    norm = stored["multi_modal_projector.mm_soft_emb_norm.weight"].numpy()
    assert np.array_equal(tensors["mm.soft_emb_norm.weight"].data.view(np.float32), norm + np.float32(1))
    half = tensors["v.blk.0.attn_q.weight"]
    expected = stored["vision_tower.encoder.layers.0.self_attn.q_proj.weight"].half().numpy()
    assert np.array_equal(half.data.view(np.float16).reshape(half.shape), expected)


def test_q8_0_is_llamacpps_rounding(tmp_path: Path) -> None:
    folder = save("qwen2_vl", tmp_path)
    to_mmproj(folder, tmp_path / "mmproj.gguf", type_name="Q8_0")
    stored = safetensors.torch.load_file(folder / "model.safetensors")["visual.blocks.1.attn.qkv.weight"]
    tensor = read_header(tmp_path / "mmproj.gguf")[1]["v.blk.1.attn_v.weight"]
    rows = tensor.data.reshape(tensor.shape[0], -1)
    values = dequantize(rows, GGMLQuantizationType.Q8_0)
    expected = stored[128:].numpy()
    assert np.abs(values - expected).max() <= np.abs(expected).max() / 127


def test_the_command(tmp_path: Path) -> None:
    """The dry run writes nothing; equal runs write equal bytes; `inspect` and `check` read the file."""
    folder, runner, file = save("qwen3_vl", tmp_path), CliRunner(), tmp_path / "mmproj.gguf"
    planned = runner.invoke(app, ["to-mmproj", str(folder), str(file), "--type", "q8_0", "--dry-run", "--json"])
    assert planned.exit_code == 0
    assert not file.exists()
    written = runner.invoke(app, ["to-mmproj", str(folder), str(file), "--type", "Q8_0"])
    assert written.exit_code == 0, written.output
    assert "Wrote" in written.output
    before = file.read_bytes()
    to_mmproj(folder, file, type_name="Q8_0")
    assert file.read_bytes() == before
    entries = inspect(file).entries
    assert sum(entry.nbytes for entry in entries) == json.loads(planned.output)["nbytes"]
    assert {entry.name for entry in entries} >= {"v.deepstack.2.fc1.weight", "v.patch_embd.weight.1"}
    assert check_file(file).errors == []
    shown = runner.invoke(app, ["inspect", str(file)])
    assert "image part" in shown.output


def test_what_is_refused(tmp_path: Path) -> None:
    """Each before anything is written, and by name."""
    folder = save("gemma3", tmp_path)
    config = json.loads((folder / "config.json").read_text())

    def refused(match: str, **changes: Any) -> None:
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=match):
            to_mmproj(folder, tmp_path / "mmproj.gguf")

    with pytest.raises(UserError, match="no type Q4_K: choose one of F16"):
        plan_mmproj(folder, "Q4_K")
    vision = config["vision_config"]
    refused("hidden_act 'gelu_pytorch_tanh', and it is 'relu'", vision_config=vision | {"hidden_act": "relu"})
    refused("config.json", vision_config=vision | {"patch_size": 0})
    refused("lacks what becomes v.blk.2", vision_config=vision | {"num_hidden_layers": 3})
    (folder / "config.json").write_text(json.dumps(config))
    path = folder / "model.safetensors"
    stored = safetensors.torch.load_file(path)
    safetensors.torch.save_file(stored | {"vision_tower.encoder.layers.0.other.weight": torch.zeros(2)}, path)
    refused("has no tensor vision_tower.encoder.layers.0.other.weight")
    large = stored["vision_tower.encoder.layers.0.mlp.fc1.weight"] * 1e7
    safetensors.torch.save_file(stored | {"vision_tower.encoder.layers.0.mlp.fc1.weight": large}, path)
    refused("holds values that F16 cannot")
    safetensors.torch.save_file(stored, path)
    (folder / "preprocessor_config.json").unlink()
    refused("preprocessor_config.json gives no image_mean")
    assert not list(tmp_path.glob("*mmproj*"))


def test_models_without_an_image_part_that_is_written(tmp_path: Path, text_models: dict[int, Path]) -> None:
    with pytest.raises(UserError, match="LlamaForCausalLM has no part that reads images"):
        plan_mmproj(text_models[64].parent / "hf")
    with pytest.raises(UserError, match="holds the text part alone"):
        plan_mmproj(text_models[64])
    folder = save("pixtral", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for model_type, match in (("clip_vision_model", "class token of CLIP"), ("siglip_vision_model", "Known: Gemma 3")):
        changed = config | {"vision_config": config["vision_config"] | {"model_type": model_type}}
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=match):
            plan_mmproj(folder)
