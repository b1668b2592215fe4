"""Models whose blocks are of several types: convolutions, state spaces, attention, experts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from family_cases import CASES, config_and_shapes, make_model, make_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Lfm2Config

import lqexport
from lqexport.converters.folders import peft
from lqexport.converters.folders.gptq import plan_gptq
from lqexport.converters.models.architectures import architecture_of, normalized
from lqexport.converters.targets import plan
from lqexport.errors import UserError
from lqexport.models.blocks import BlockModel
from lqexport.models.modules import expected_shapes, meta_model
from lqexport.models.source import HuggingFaceSource, open_source
from lqexport.models.written import open_export
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.target import Target


def test_older_keys_of_lfm2() -> None:
    """The width of the MLP is computed as in transformers, and an older key counts before the usual one."""
    config, shapes = config_and_shapes("lfm2")
    older = {key: value for key, value in config.items() if key not in ("layer_types", "tie_word_embeddings")}
    older |= {"intermediate_size": 7, "block_ff_dim": 144, "tie_embedding": True, "full_attn_idxs": [1, 2]}
    complete = normalized(older)
    assert complete["layer_types"] == ["conv", "full_attention", "full_attention"]
    assert complete["tie_word_embeddings"]
    assert complete["intermediate_size"] == shapes["model.layers.0.feed_forward.w1.weight"][0] == 96
    assert normalized(complete) == complete
    again = CONFIG_MAPPING["lfm2"](**{key: value for key, value in complete.items() if key != "model_type"})
    assert (again.intermediate_size, again.block_auto_adjust_ff_dim, again.tie_word_embeddings) == (96, False, True)


def test_lfm2_without_types_of_blocks_has_attention_alone() -> None:
    config, _ = config_and_shapes("lfm2")
    lacking = {key: value for key, value in config.items() if key not in ("layer_types", "full_attn_idxs")}
    assert normalized(lacking)["layer_types"] == ["full_attention"] * 3


def test_names_of_experts_in_checkpoints_of_lfm2(tmp_path: Path) -> None:
    model = make_model("lfm2moe")
    model.save_pretrained(tmp_path)
    block = model.model.layers[2].feed_forward.experts
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert "model.layers.2.feed_forward.experts.3.w1.weight" in stored
    assert "tie_embedding" not in json.loads((tmp_path / "config.json").read_text())
    source, prefix = open_source(str(tmp_path)), "model.layers.2.feed_forward.experts.3"
    assert torch.equal(source.read(f"{prefix}.gate_proj.weight"), block.gate_up_proj[3].chunk(2)[0])
    assert torch.equal(source.read(f"{prefix}.up_proj.weight"), block.gate_up_proj[3].chunk(2)[1])
    assert torch.equal(source.read(f"{prefix}.down_proj.weight"), block.down_proj[3])


@pytest.mark.parametrize("name", ["qwen3next", "granite4"])
def test_gptq_of_linears_in_parts_is_refused_by_name(name: str) -> None:
    config, shapes = config_and_shapes(name)
    with pytest.raises(UserError, match=r"GPTQ's layout of .*ForCausalLM is not written"):
        plan_gptq(Target.parse("gptq:4-g32"), config, shapes)


def test_corrections_of_linears_in_parts_are_no_peft_adapter(tmp_path: Path) -> None:
    factor = "model.layers.0.shared_mlp.input_linear.gate_proj.lora_A.weight"
    artifact = SimpleNamespace(config=lambda: config_and_shapes("granite4")[0], manifest=lambda: {factor: {}})
    with pytest.raises(UserError, match=r"input_linear.gate_proj.weight is a part of a linear of transformers"):
        peft.write(artifact, tmp_path / "peft")  # type: ignore[arg-type]


def test_folders_hold_convolutions_as_transformers_does(tmp_path: Path) -> None:
    """A native folder loads there. GPTQ's folder has the same form, and is read back."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Lfm2Config(**CASES["lfm2"][1] | {"num_key_value_heads": 2})).eval()
    model.save_pretrained(tmp_path / "hf")
    make_tokenizer("smaug-bpe", tmp_path).save_pretrained(tmp_path / "hf")
    name, tokens = "model.layers.0.conv.conv.weight", torch.tensor([[1, *range(20, 60)]])
    for target in ("native:affine-8-g32", "gptq:4-g32"):
        artifact = tmp_path / target.partition(":")[0]
        quantize(Recipe(str(tmp_path / "hf"), target, method="rtn"), artifact)
        folder = lqexport.export(artifact, tmp_path / f"{artifact.name}-folder")
        assert safetensors.torch.load_file(folder / "model.safetensors")[name].shape == (64, 1, 4)
        assert torch.equal(open_export(folder).read(name), open_export(artifact).read(name))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "native-folder", dtype=torch.float32)
    with torch.no_grad():
        difference = loaded(tokens, use_cache=False).logits - model(tokens, use_cache=False).logits
    assert difference.abs().mean() < 0.03


def test_linears_that_a_checkpoint_of_granite_stores_in_one_tensor(tmp_path: Path) -> None:
    model = make_model("granite4")
    model.save_pretrained(tmp_path)
    source, mlp = HuggingFaceSource(tmp_path, ""), model.model.layers[1].shared_mlp
    for number, linear in enumerate(("gate_proj", "up_proj")):
        name = f"model.layers.1.shared_mlp.input_linear.{linear}.weight"
        weight = mlp.input_linear.weight.chunk(2)[number].detach()
        assert torch.equal(source.read(name), weight)
        assert source.shape(name) == tuple(weight.shape)


def test_older_keys_of_granite_4() -> None:
    config, _ = config_and_shapes("granite4")
    older = {key: value for key, value in config.items() if key not in ("layer_types", "layers_block_type")}
    types = ["mamba", "mamba", "attention"]
    for key in ("layer_types", "layers_block_type"):
        complete = normalized(older | {key: types})
        assert complete["layer_types"] == ["linear_attention", "linear_attention", "full_attention"]
        assert complete["key_heads_of_blocks"] == [0, 0, 2]


@pytest.mark.parametrize(
    "limit", [None, [0.0, float("inf")], [0, "inf"], [0.0, {"__float__": "Infinity"}], (0.0, float("inf"))]
)
def test_spellings_of_time_steps_without_a_limit(limit: object) -> None:
    config, _ = config_and_shapes("granite4")
    complete = normalized(config | {"time_step_limit": limit})
    assert complete["time_step_limit"] == [0.0, float("inf")]
    meta_model(complete)


@pytest.mark.parametrize(
    ("name", "types", "lacking"),
    [
        ("lfm2", ["conv"] * 3, "full_attention"),
        ("lfm2", ["full_attention"] * 3, "conv"),
        ("granite4", ["mamba"] * 3, "full_attention"),
        ("granite4", ["attention"] * 3, "linear_attention"),
    ],
)
def test_models_whose_blocks_are_of_one_type_are_refused(name: str, types: list[str], lacking: str) -> None:
    """llama.cpp stops with an assertion."""
    config, _ = config_and_shapes(name)
    config |= {"layer_types": types}
    with pytest.raises(UserError, match=f"only where some block is '{lacking}'"):
        plan(Target.parse("gguf:Q4_K"), config, expected_shapes(config))


def test_older_keys_of_nemotron_h() -> None:
    """Letters, older names of types, and the lack of both, where transformers has a default."""
    config, _ = config_and_shapes("nemotron-h")
    older = {key: value for key, value in config.items() if key not in ("layer_types", "layers_block_type", "n_groups")}
    older |= {"mamba_n_groups": 2, "num_hidden_layers": 7}
    letters = older | {"hybrid_override_pattern": "M-*"}
    names = older | {"layers_block_type": ["mamba", "mlp", "attention"]}
    for complete in (normalized(letters), normalized(names)):
        assert complete["layer_types"] == ["linear_attention", "mlp", "full_attention"]
        assert (complete["num_hidden_layers"], complete["n_groups"]) == (3, 2)
        assert (complete["key_heads_of_blocks"], complete["widths_of_blocks"]) == ([0, 0, 2], [0, 96, 0])
        assert expected_shapes(complete) == expected_shapes(config)
    made = CONFIG_MAPPING["nemotron_h"]()
    assert normalized(older)["layer_types"] == made.layers_block_type
    assert architecture_of(letters).gguf == "nemotron_h"
    assert architecture_of(letters | {"hybrid_override_pattern": "ME*"}).gguf == "nemotron_h_moe"


def test_names_in_checkpoints_of_nemotron_h(tmp_path: Path) -> None:
    """Checkpoints on the hub have other names. A block that predicts further tokens is left out if it lacks tensors."""
    model = make_model("nemotron-h-moe")
    model.save_pretrained(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    renamed = {re.sub("^model", "backbone", name): tensor for name, tensor in stored.items()}
    assert "backbone.layers.1.mixer.experts.3.up_proj.weight" in renamed
    further = {"mtp.layers.0.mixer.q_proj.weight": torch.zeros(4, 4)}
    safetensors.torch.save_file(renamed | further, tmp_path / "model.safetensors")
    source, experts = open_source(str(tmp_path)), model.model.layers[1].mixer.experts
    shapes = {name: source.shape(name) for name in source.names()}
    assert "mtp" not in "".join(tensor.name for tensor in plan(Target.parse("gguf:F16"), source.config, shapes))
    assert torch.equal(source.read("model.layers.1.mixer.experts.3.up_proj.weight"), experts.up_proj[3])


@torch.no_grad()
def test_factors_of_falcon_h1_become_parts_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output that is tied, and has another factor than the embedding, becomes a tensor of its own."""
    class_name, options, tokenizer = CASES["falcon-h1"]
    monkeypatch.setitem(CASES, "falcon-h1", (class_name, options | {"tie_word_embeddings": True}, tokenizer))
    model = make_model("falcon-h1")
    model.save_pretrained(tmp_path)
    source = open_source(str(tmp_path))
    embedding = model.model.embed_tokens.weight
    assert torch.equal(source.read("model.embed_tokens.weight"), embedding * 2)
    assert torch.equal(source.read("lm_head.weight"), embedding * 0.5)
    assert source.shape("lm_head.weight") == (512, 64)
    assert not source.config["tie_word_embeddings"]
    assert source.config["mlp_multipliers"] == [1.0, 1.0]
    tokens, blocks = torch.arange(3, 40)[None], BlockModel(source)
    states = blocks.start(tokens)
    for _, block in blocks.blocks():
        states = blocks.run(block, states)
    assert torch.allclose(blocks.logits(states), model(tokens, use_cache=False).logits, atol=1e-4)
