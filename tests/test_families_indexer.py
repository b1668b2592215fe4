"""DeepSeek V3.2 and GLM-5: an indexer chooses the tokens that a token attends to, and `kv_b_proj` is two linears."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_cases import CASES, config_and_shapes, export, make_model, make_tokenizer
from family_cases import texts as texts
from further_blocks import Predicting
from gguf import GGUFWriter
from transformers import PreTrainedModel

from lqexport.calibration.make_imatrix import make_imatrix
from lqexport.converters.gguf.config import Metadata, config_of
from lqexport.converters.gguf.imatrix import read_imatrix
from lqexport.converters.gguf.metadata import add_model
from lqexport.converters.models.architectures import architecture_of, normalized
from lqexport.converters.targets import plan
from lqexport.errors import UserError
from lqexport.evaluation.llamacpp import LlamaCpp
from lqexport.evaluation.llamacpp_quantizer import quantize as llamacpp_quantize
from lqexport.models.blocks import BlockModel
from lqexport.models.imatrix import imatrix_of
from lqexport.models.source import HuggingFaceSource, open_source
from lqexport.recipe import Recipe
from lqexport.target import Target

TOKENS = [1, *(int(token) for token in np.random.default_rng(0).integers(3, 480, 59))]
FEW = {"index_topk": 16, "index_n_heads": 32}
"""Fewer tokens are chosen than there are. With few heads, scores would often be equal: zero."""
ONE_BLOCK = {"num_hidden_layers": 1, "first_k_dense_replace": 1, "indexer_types": ["full"]}
SHARED = {"indexer_types": ["full", "shared", "shared"], "first_k_dense_replace": 3}


def saved(
    name: str, change: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[PreTrainedModel, str]:
    """Returns the model of a case with other options, and the folder that it is saved in."""
    class_name, options, tokenizer = CASES[name]
    monkeypatch.setitem(CASES, name, (class_name, options | change, tokenizer))
    model = make_model(name)
    model.save_pretrained(folder / "hf")
    make_tokenizer(tokenizer, folder).save_pretrained(folder / "hf")
    return model, str(folder / "hf")


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> np.ndarray:
    return model(torch.tensor([TOKENS]), use_cache=False).logits[0].numpy()


@pytest.mark.llamacpp
@pytest.mark.parametrize(("name", "change"), [("deepseek-v32", ONE_BLOCK), ("glm-dsa", ONE_BLOCK), ("glm-dsa", SHARED)])
def test_llamacpp_chooses_the_tokens_that_transformers_chooses(
    name: str, change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks choose by what they get from the block before: rounding errors change the choice of a second one."""
    model, source = saved(name, FEW | change, tmp_path, monkeypatch)
    path = export(tmp_path, Recipe(source, "gguf:F16"))
    with LlamaCpp(path, 64, threads=1) as engine:
        assert np.abs(engine.logits(TOKENS) - logits_of(model)).mean() < 0.003


@pytest.mark.parametrize(("name", "change"), [("deepseek-v32", {}), ("glm-dsa", {"index_topk": 16}), ("glm-dsa", FEW)])
def test_blocks_that_run_one_at_a_time_choose_the_same_tokens(
    name: str, change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, source = saved(name, change, tmp_path, monkeypatch)
    model = BlockModel(open_source(source))
    states = model.start(torch.tensor([TOKENS]))
    widths = [states.shape[-1] - model.hidden_of(states).shape[-1]]
    for _, block in model.blocks():
        states = model.run(block, states)
        widths.append(states.shape[-1] - model.hidden_of(states).shape[-1])
    assert np.abs(model.logits(states)[0].numpy() - logits_of(whole)).max() < 1e-4
    chosen = min(len(TOKENS), whole.config.index_topk)
    assert widths == [0, chosen if name == "glm-dsa" else 0, 0, 0]
    assert max(widths) <= model.architecture.carried(model.weights.config)


def test_keys_and_values_are_linears_of_their_own(tmp_path: Path) -> None:
    """The first is transposed head by head, as llama.cpp multiplies queries by it."""
    model = make_model("deepseek-v32")
    model.save_pretrained(tmp_path)
    source, config = HuggingFaceSource(tmp_path, ""), model.config
    fused = model.model.layers[1].self_attn.kv_b_proj.weight.detach().unflatten(0, (config.num_attention_heads, -1))
    for part, heads in (
        ("k_b", fused[:, : config.qk_nope_head_dim].transpose(1, 2)),
        ("v_b", fused[:, config.qk_nope_head_dim :]),
    ):
        name = f"model.layers.1.self_attn.kv_b_proj.{part}.weight"
        assert torch.equal(source.read(name), heads.flatten(0, 1))
        assert source.shape(name) == tuple(heads.flatten(0, 1).shape)
        assert source.nbytes(name) == 4 * heads.numel()
    assert not any(name.endswith("kv_b_proj.weight") for name in source.names())


def test_the_transposed_part_is_rounded_and_not_solved() -> None:
    config, shapes = config_and_shapes("glm-dsa")
    made = Predicting("glm-dsa")
    further = {name.replace("kv_b_proj", "kv_b_proj.v_b"): tuple(tensor.shape) for name, tensor in made.names().items()}
    k_b = "self_attn.kv_b_proj.k_b.weight"
    further["model.layers.3." + k_b] = shapes["model.layers.2." + k_b]
    planned = {tensor.name: tensor for tensor in plan(Target.parse("gguf:Q4_0"), config, shapes | further)}
    for layer in range(4):
        tensor = planned[f"model.layers.{layer}.{k_b}"]
        assert (tensor.codec_name, tensor.linear) == ("gguf:Q8_0", False)


@pytest.mark.llamacpp
def test_importance_matrices_have_a_matrix_for_each_head(tmp_path: Path, texts: tuple[str, str]) -> None:
    """llama.cpp's quantizer reads them. In one that llama-imatrix has collected, heads differ; their mean counts."""
    make_model("glm-dsa").save_pretrained(tmp_path / "hf")
    make_tokenizer("smaug-bpe", tmp_path).save_pretrained(tmp_path / "hf")
    source, path = str(tmp_path / "hf"), tmp_path / "imatrix.gguf"
    make_imatrix(source, path, calibration=texts[0], samples=2, sequence_length=64)
    means = read_imatrix(path).means["blk.1.attn_v_b.weight"]
    assert means.shape == (4, 64)
    llamacpp_quantize(export(tmp_path, Recipe(source, "gguf:F16")), tmp_path / "out.gguf", "Q4_0", imatrix=path)
    imatrix = imatrix_of(open_source(source), Recipe(source, "gguf:Q4_0", imatrix=str(path)))
    assert imatrix is not None
    imatrix.matrix.means["blk.1.attn_v_b.weight"] = means * np.arange(4)[:, None]
    found = imatrix.means("model.layers.1.self_attn.kv_b_proj.v_b.weight", 64)
    assert np.allclose(found, 1.5 * means[0])


def test_which_blocks_choose_tokens() -> None:
    """transformers has three ways to say it. A file that does not say it has an indexer in every block."""
    config, _ = config_and_shapes("glm-dsa")
    lacking = {key: value for key, value in config.items() if key != "indexer_types"} | {"num_hidden_layers": 6}
    for key in ("mlp_layer_types", "layer_types"):
        del lacking[key]
    frequency = {"index_topk_freq": 3, "index_skip_topk_offset": 2}
    for given, expected in (({}, "ffffff"), (frequency, "ffssfs"), ({"index_topk_pattern": "FSSFSS"}, "fssfss")):
        hf = type(make_model("glm-dsa").config)(**lacking | given)
        types = normalized(lacking | given)["indexer_types"]
        assert types == hf.indexer_types
        assert "".join(each[0] for each in types) == expected
    with pytest.raises(UserError, match="the first of indexer_types is 'shared'"):
        normalized(config | {"indexer_types": ["shared", "full", "full"]})


def test_a_bias_without_which_llamacpp_does_not_load_the_model() -> None:
    config, shapes = config_and_shapes("deepseek-v32")
    name = "model.layers.1.self_attn.indexer.k_norm.bias"
    del shapes[name]
    with pytest.raises(UserError, match=f"has no tensor {name}"):
        plan(Target.parse("gguf:Q4_0"), config, shapes)


def test_files_of_glm_5_that_do_not_say_which_blocks_choose() -> None:
    """llama.cpp's converter leaves the key out where all blocks do."""
    config = normalized(config_and_shapes("glm-dsa")[0])
    writer = GGUFWriter(None, "glm-dsa")
    add_model(writer, architecture_of(config), config, 512)
    metadata = {key: value.value for key, value in writer.kv_data[0].items()}
    assert metadata.pop("glm-dsa.attention.indexer.types") == [1, 0, 1]
    full = architecture_of(config | {"indexer_types": ["full"] * 3})
    assert config_of(Metadata("file", full, metadata), 512, set(), {})["indexer_types"] == ["full"] * 3
