"""Models that a target cannot hold are refused before any work. Also OPT, and the text part of a model with images."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from family_cases import (
    DEEPSEEK_ROPE,
    LLAMA3,
    MINISTRAL_ROPE,
    ONE_KEY_A_QUERY,
    YARN,
    config_and_shapes,
    export,
    make_model,
    make_tokenizer,
)
from family_cases import texts as texts
from transformers import AutoModelForCausalLM

from lqexport.converters.exl2.plan import plan_exl2
from lqexport.converters.folders import native
from lqexport.converters.gguf.reader import GGUFModel
from lqexport.converters.targets import plan
from lqexport.errors import UserError
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.storage.artifact import Artifact
from lqexport.target import Target
from lqexport.verification.verifying import verify


def test_opt_has_no_gguf_and_a_native_artifact(tmp_path: Path, texts: tuple[str, str]) -> None:
    torch.manual_seed(0)
    options = ONE_KEY_A_QUERY | {"ffn_dim": 96, "word_embed_proj_dim": 64}
    model = AutoModelForCausalLM.from_config(transformers.OPTConfig(**options))
    model.save_pretrained(tmp_path / "hf")
    make_tokenizer("gpt-2", tmp_path).save_pretrained(tmp_path / "hf")
    source = str(tmp_path / "hf")
    for target in ("gguf:Q4_K", "gguf:F16"):
        with pytest.raises(UserError, match=r"llama\.cpp does not run OPTForCausalLM"):
            quantize(Recipe(source, target), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    recipe = Recipe(source, "native:table-4", calibration=texts[0], samples=4, sequence_length=64, tune=0, descent=1)
    quantize(recipe, tmp_path / "native")
    result = verify(tmp_path / "native", source, text=texts[1], windows=1)
    assert result.warnings == result.failed == []
    assert result.evaluations[0].kl < 0.05


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act 'silu'"),
        ("gemma2", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar 32"),
        ("gemma3", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "every n-th block"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}, "every fourth block"),
        ("qwen3moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("qwen2moe", {"norm_topk_prob": True}, "norm_topk_prob False"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv None"),
        ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads equal to num_attention_heads"),
        ("glm4moe", {"n_group": 2}, "n_group 1"),
        ("minimax-m2", {"tie_word_embeddings": True}, "tie_word_embeddings False"),
        ("ernie4_5-moe", {"moe_layer_end_index": 1}, "moe_layer_end_index -1"),
        ("ernie4_5-moe", {"moe_layer_interval": 2}, "moe_layer_interval 1"),
        ("hunyuan-moe", {"attention_bias": True}, "attention_bias False"),
        ("phi3", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling of type 'yarn'"),
        ("ministral3", {"rope_parameters": MINISTRAL_ROPE | {"mscale": 0.7}}, "without mscale, mscale_all_dim"),
        ("ministral3", {"rope_parameters": MINISTRAL_ROPE | {"beta_fast": 16}}, "without beta_fast"),
        ("ministral3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope scaling of type 'linear'"),
        ("glm4", {"rope_parameters": YARN | {"attention_factor": 1.0}}, "without attention_factor"),
        ("glm", {"rope_parameters": LLAMA3}, "rope scaling of type 'llama3'"),
        ("glm", {"head_dim": 32}, "add up to hidden_size"),
        ("hunyuan", {"attention_bias": True}, "attention_bias False"),
        ("olmo3", {"tie_word_embeddings": True}, "tie_word_embeddings False"),
        ("seed-oss", {"attention_out_bias": True}, "attention_out_bias False"),
        ("ernie4_5", {"use_bias": True}, "use_bias False"),
        ("arcee", {"hidden_act": "silu"}, "hidden_act 'relu2'"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention None or False"),
        ("olmo3", {"rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_theta": 1e5}}}, "10000"),
        ("olmo3", {"rope_parameters": {"full_attention": YARN, "sliding_attention": YARN}}, "scaling within windows"),
        ("falcon", {"alibi": True}, "alibi"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm False"),
        ("cohere2", {"head_dim": 32}, "add up to hidden_size"),
        ("exaone4", {"sliding_window": 64}, "sliding_window None"),
        ("phi2", {"qk_layernorm": True}, "qk_layernorm False"),
        ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual False"),
        ("qwen2vl", {"mrope_section": [2, 2, 3]}, "with the sum 8"),
        ("granite", {"rope_parameters": {"rope_type": "proportional"}}, "'proportional'"),
        ("deepseek-v2", {"topk_method": "group_limited_greedy"}, "topk_method 'greedy'"),
        ("deepseek-v3", {"rope_parameters": DEEPSEEK_ROPE | {"mscale": 1.0}}, "without mscale, mscale_all_dim"),
    ],
)
def test_what_llamacpp_computes_otherwise_is_refused_before_any_work(
    name: str, change: dict[str, Any], message: str
) -> None:
    config, shapes = config_and_shapes(name)
    plan(Target.parse("gguf:Q4_K"), config, shapes)
    with pytest.raises(UserError, match=message):
        plan(Target.parse("gguf:Q4_K"), config | change, shapes)
    plan(Target.parse("native:table-4"), config | change, shapes)


@pytest.mark.parametrize("name", ["qwen3", "granite", "falcon"])
def test_exl2_is_refused_by_name(name: str) -> None:
    config, shapes = config_and_shapes(name)
    with pytest.raises(UserError, match=f"EXL2 folders of {config['architectures'][0]}"):
        plan_exl2(config, shapes, bits=4, head_bits=6)


@pytest.mark.parametrize(
    ("name", "family", "rope", "pattern", "prefix"),
    [
        ("gemma3", "Gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "^", "language_model."),
        ("mistral", "Mistral3", {"rope_theta": 1e4}, "^", "language_model."),
        ("ministral3", "Mistral3", {"rope_parameters": MINISTRAL_ROPE}, "^", "language_model."),
        ("ministral3", "Mistral3", {"rope_parameters": MINISTRAL_ROPE}, r"^model\.", "model.language_model."),
    ],
)
def test_text_part_of_a_model_with_images(
    tmp_path: Path, name: str, family: str, rope: dict[str, Any], pattern: str, prefix: str
) -> None:
    """Models as on the hub: sizes in text_config, other tensor names, parts besides the text model."""
    model = make_model(name)
    model.save_pretrained(tmp_path / "text")
    make_tokenizer("gpt-2", tmp_path).save_pretrained(tmp_path / "text")
    shutil.copytree(tmp_path / "text", tmp_path / "images")
    config = json.loads((tmp_path / "text/config.json").read_text())
    text = {key: value for key, value in config.items() if key not in ("architectures", "rope_parameters")}
    whole = {"architectures": [f"{family}ForConditionalGeneration"], "model_type": family.lower()}
    whole["text_config"] = text | rope
    (tmp_path / "images/config.json").write_text(json.dumps(whole))
    tensors = safetensors.torch.load_file(tmp_path / "text/model.safetensors")
    renamed = {re.sub(pattern, prefix, tensor_name): tensor for tensor_name, tensor in tensors.items()}
    vision = {"vision_tower.vision_model.post_layernorm.weight": torch.ones(8)}
    safetensors.torch.save_file(renamed | vision, tmp_path / "images/model.safetensors")
    files = []
    for folder in (tmp_path / "text", tmp_path / "images"):
        path = export(folder, Recipe(str(folder), "gguf:F16"))
        metadata = {key: value for key, value in GGUFModel(path).metadata.items() if not key.startswith("lqexport.")}
        manifest = Artifact(folder / "artifact-F16").manifest()
        files.append((metadata | {"general.name": None}, manifest))
    assert files[0] == files[1]


@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_native_folders_that_transformers_could_not_load(name: str, tmp_path: Path) -> None:
    make_model(name).save_pretrained(tmp_path / "hf")
    quantize(Recipe(str(tmp_path / "hf"), "native:affine-4-g32", method="rtn"), tmp_path / "artifact")
    with pytest.raises(UserError, match="transformers keeps the linears"):
        native.write(Artifact(tmp_path / "artifact"), tmp_path / "folder")
