"""Models whose blocks are of several types: convolutions, state spaces, attention, experts."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch
from family_cases import config_and_shapes, make_model
from transformers import CONFIG_MAPPING

from lqexport.converters.models.architectures import normalized
from lqexport.models.source import open_source


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
