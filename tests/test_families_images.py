"""The text part of models with images or sound: its GGUF file in llama.cpp against transformers' whole model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from family_cases import CASES, config_and_shapes, export, make_tokenizer, randomized
from family_cases import pieces as pieces
from transformers import AutoConfig

from lqexport.converters.gguf.support import check_supported
from lqexport.converters.models.architectures import architecture_of, normalized
from lqexport.converters.models.text_parts import WITH_TEXT_PARTS
from lqexport.errors import UserError
from lqexport.evaluation.llamacpp import LlamaCpp
from lqexport.models.source import open_source
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.storage.artifact import Artifact

TOKENS = [1, *(int(token) for token in np.random.default_rng(0).integers(3, 480, 40))]
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 16}
CLIP = VISION | {"model_type": "clip_vision_model", "projection_dim": 16}
INTERN = VISION | {"model_type": "internvl_vision", "image_size": [32, 32], "patch_size": [16, 16]}
EARS = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
QWEN2_EYES = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}
QWEN2_5_EYES = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
QWEN3_EYES = QWEN2_5_EYES | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
QWEN3_5_EYES = QWEN2_5_EYES | {"num_position_embeddings": 16}
GEMMA4_EYES = VISION | {"head_dim": 16, "pooling_kernel_size": 1}
LLAMA4_EYES = VISION | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
QWEN2_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
QWEN3_ROPE = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}
QWEN3_5_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2], "partial_rotary_factor": 0.5}
QWEN3_MOE_ROPE = QWEN3_ROPE | {"mrope_section": [6, 5, 5]}
KIMI_EYES = VISION | {"patch_size": 4, "pos_emb_height": 8, "pos_emb_width": 8}
OPTIONS: dict[str, dict[str, Any]] = {
    "Qwen3VL": {"rope_parameters": QWEN3_ROPE},
    "Qwen3VLMoe": {"rope_parameters": QWEN3_MOE_ROPE, "num_hidden_layers": 2},
    "Qwen3_5": {"rope_parameters": QWEN3_5_ROPE},
    "Qwen3_5Moe": {"rope_parameters": QWEN3_5_ROPE},
    "Kimi_K25": {"first_k_dense_replace": 2},  # rounding errors send few tokens to other experts
}
"""Name of a config class -> options of its text part."""
TEXTS = {"Qwen3VLMoe": "qwen3vlmoe", "Qwen3_5": "qwen3_5", "Qwen3_5Moe": "qwen3_5moe", "Kimi_K25": "deepseek-v3"}
"""Name of a config class -> the case with the options of its text part, where that is not `model_type`."""
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "Llava": ("llama", CLIP, "llama-bpe"),
    "LlavaNext": ("mistral", CLIP, "smaug-bpe"),
    "LlavaOnevision": ("qwen2", VISION | {"model_type": "siglip_vision_model"}, "qwen2"),
    "SmolVLM": ("llama", VISION, "smollm"),
    "VipLlava": ("llama", CLIP, "llama-bpe"),
    "Idefics3": ("llama", VISION, "smollm"),
    "Lfm2Vl": ("lfm2", VISION | {"model_type": "siglip2_vision_model"}, "llama-bpe"),
    "InternVL": ("qwen3", INTERN, "qwen2"),
    "Qwen2Audio": ("qwen2", EARS, "qwen2"),
    "Kimi_K25": ("deepseek_v3", KIMI_EYES, "deepseek-v3"),
    "Gemma4": ("gemma4_text", GEMMA4_EYES, "pieces without prefix"),
    "Llama4": ("llama4_text", LLAMA4_EYES, "llama-bpe"),
    "Qwen2VL": ("qwen2_vl_text", QWEN2_EYES, "qwen2"),
    "Qwen2_5_VL": ("qwen2_5_vl_text", QWEN2_5_EYES, "qwen2"),
    "Qwen3VL": ("qwen3_vl_text", QWEN3_EYES, "qwen2"),
    "Qwen3VLMoe": ("qwen3_vl_moe_text", QWEN3_EYES, "qwen2"),
    "Qwen3_5": ("qwen3_5_text", QWEN3_5_EYES, "qwen35"),
    "Qwen3_5Moe": ("qwen3_5_moe_text", QWEN3_5_EYES, "qwen35"),
}
"""Name of transformers' config class -> `model_type` of the text part, options of the other part, tokenizer."""
ARCHITECTURES = {"Llava": "llama", "LlavaNext": "llama", "LlavaOnevision": "qwen2", "SmolVLM": "llama"}
ARCHITECTURES |= {"Lfm2Vl": "lfm2", "VipLlava": "llama", "Idefics3": "llama", "InternVL": "qwen3"}
ARCHITECTURES |= {"Gemma4": "gemma4", "Llama4": "llama4", "Kimi_K25": "deepseek2"}
ARCHITECTURES |= {"Qwen2Audio": "qwen2", "Qwen2VL": "qwen2vl", "Qwen2_5_VL": "qwen2vl", "Qwen3VL": "qwen3vl"}
ARCHITECTURES |= {"Qwen3VLMoe": "qwen3vlmoe", "Qwen3_5": "qwen35", "Qwen3_5Moe": "qwen35moe"}


def whole_model(name: str) -> transformers.PreTrainedModel:
    """Returns a small random model with a text part and a part for images or sound."""
    model_type, other, _ = MODELS[name]
    text = CASES[TEXTS.get(name, "qwen2" if model_type.startswith("qwen") else model_type.removesuffix("_text"))][1]
    text = {key: value for key, value in text.items() if key != "rope_parameters"} | {"model_type": model_type}
    if model_type.startswith("qwen") and model_type.endswith("_text"):
        text |= OPTIONS.get(name, {"rope_parameters": QWEN2_ROPE})
    elif name in OPTIONS:
        text |= OPTIONS[name]
    other_part = {"audio_config" if name == "Qwen2Audio" else "vision_config": other}
    config = getattr(transformers, f"{name}Config")(text_config=text, tie_word_embeddings=False, **other_part)
    torch.manual_seed(0)
    return randomized(getattr(transformers, f"{name}ForConditionalGeneration")(config), TEXTS.get(name, name))


def name_as_published(folder: Path) -> None:
    """Gives a Kimi K2.5 the names that it has on the hub. transformers 5.23 writes `blocks` for the text's `layers`."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["KimiK25ForConditionalGeneration"]}
    config["text_config"] |= {"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    named = {
        name.replace("language_model.model.blocks.", "language_model.model.layers."): stored[name] for name in stored
    }
    safetensors.torch.save_file(named, folder / "model.safetensors")


@pytest.mark.llamacpp
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_the_text_part_are_those_of_the_whole_model(name: str, tmp_path: Path, pieces: Path) -> None:
    model = whole_model(name)
    model.save_pretrained(tmp_path / "hf")
    make_tokenizer(MODELS[name][2], pieces).save_pretrained(tmp_path / "hf")
    if name == "Kimi_K25":
        name_as_published(tmp_path / "hf")
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([TOKENS])).logits[0].numpy()
    path = export(tmp_path, Recipe(str(tmp_path / "hf"), "gguf:F16"))
    assert open_source(str(path)).metadata["general.architecture"] == ARCHITECTURES[name]  # type: ignore[attr-defined]
    with LlamaCpp(path, 64, threads=1) as engine:
        assert np.abs(engine.logits(TOKENS) - expected).mean() < 0.003


def test_older_config_of_qwen2_vl_has_the_text_keys_at_the_top(tmp_path: Path) -> None:
    """config.json as on the hub and config.json of transformers 5 give the same artifact."""
    model = whole_model("Qwen2_5_VL")
    model.save_pretrained(tmp_path / "new")
    config = json.loads((tmp_path / "new/config.json").read_text())
    text = config.pop("text_config")
    rope = {"rope_theta": 1e4, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    del text["rope_parameters"]
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    (tmp_path / "old/config.json").write_text(json.dumps(text | config | rope))
    manifests = []
    for name in ("new", "old"):
        quantize(Recipe(str(tmp_path / name), "native:affine-4-g32", method="rtn"), tmp_path / f"{name}-artifact")
        artifact = Artifact(tmp_path / f"{name}-artifact")
        found = architecture_of(artifact.config())
        assert (found.gguf, artifact.config()["mrope_section"]) == ("qwen2vl", [2, 3, 3])
        assert AutoConfig.for_model(**artifact.config()).rope_parameters["rope_type"] == "default"
        manifests.append(artifact.manifest())
    assert manifests[0] == manifests[1]


def test_kimi_k2_is_deepseek_v3_by_another_name() -> None:
    config = config_and_shapes("deepseek-v3")[0]
    assert normalized(config | {"model_type": "kimi_k2"}) == normalized(config)
    rope = config["rope_parameters"] | {"beta_fast": 1.0}
    with pytest.raises(UserError, match="without beta_fast of config"):
        check_supported(architecture_of(config), normalized(config | {"rope_parameters": rope}))


def test_text_parts_of_unknown_families_are_refused() -> None:
    config = {"architectures": ["LlavaForConditionalGeneration"], "text_config": {"model_type": "persimmon"}}
    with pytest.raises(UserError, match="Unknown architecture LlavaForConditionalGeneration"):
        architecture_of(config)


def test_every_class_with_text_parts_is_one_of_transformers() -> None:
    assert all(hasattr(transformers, name.replace("KimiK25", "Kimi_K25")) for name in WITH_TEXT_PARTS)


def test_experts_of_qwen3_vl_on_the_hub_are_transposed(tmp_path: Path) -> None:
    """transformers reads them in both forms, and writes them as linears are."""
    whole_model("Qwen3VLMoe").save_pretrained(tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "hub")
    stored = safetensors.torch.load_file(tmp_path / "new/model.safetensors")
    transposed = {key: value.mT.contiguous() for key, value in stored.items() if ".experts." in key}
    safetensors.torch.save_file(stored | transposed, tmp_path / "hub/model.safetensors", {"format": "pt"})
    sources = [open_source(str(tmp_path / name)) for name in ("new", "hub")]
    experts = [name for name in sources[0].names() if ".experts." in name]
    assert len(experts) == 2 * 4 * 3
    for name in experts:
        first, second = (source.read(name) for source in sources)
        assert torch.equal(first, second)
        assert sources[1].shape(name) == tuple(first.shape)
