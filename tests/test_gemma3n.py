"""Gemma 3n: keys of earlier blocks, and a table with fewer rows than the embedding. Streams: test_carried.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from family_cases import CASES, export, make_tokenizer, randomized
from transformers import AutoModelForCausalLM, PreTrainedModel

from lqexport.converters.gguf.reader import GGUFModel
from lqexport.evaluation.llamacpp import LlamaCpp
from lqexport.models.blocks import BlockModel
from lqexport.models.source import open_source
from lqexport.recipe import Recipe

TABLE = "model.embed_tokens_per_layer.weight"
DEEP = {"num_hidden_layers": 22, "num_kv_shared_layers": 2, "layer_types": None, "activation_sparsity_pattern": None}
DEEP |= {"vocab_size_per_layer_input": 500, "intermediate_size": 1536}
TOKENS = [1, *(int(token) for token in np.random.default_rng(0).integers(3, 480, 40)), 500, 511]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """A model whose last two blocks use keys of earlier ones, and a folder with it in `hf`."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gemma3n")
    config = transformers.Gemma3nTextConfig(**CASES["gemma3n"][1] | DEEP)
    model = randomized(AutoModelForCausalLM.from_config(config), "gemma3n")
    for name, parameter in model.named_parameters():  # so that rounding errors do not grow with depth
        if "post_" in name or "_coefs" in name:
            parameter.data *= 0.3
    model.save_pretrained(folder / "hf")
    make_tokenizer("gpt-2", folder).save_pretrained(folder / "hf")
    return model, folder


def _logits(model: BlockModel) -> np.ndarray:
    """Returns the logits of a model that is run block by block."""
    states = model.start(torch.tensor([TOKENS]))
    for _, block in model.blocks():
        states = model.run(block, states)
    return model.logits(states)[0].numpy()


@pytest.mark.llamacpp
@torch.no_grad()
def test_blocks_that_use_keys_of_others(deep: tuple[PreTrainedModel, Path]) -> None:
    """llama.cpp loads them only with keys and values; the file has zeros there."""
    model, folder = deep
    path = export(folder, Recipe(str(folder / "hf"), "gguf:F16"))
    expected = model(torch.tensor([TOKENS]), use_cache=False).logits[0].numpy()
    assert 0.5 < expected.std() < 2
    with LlamaCpp(path, 48, threads=1) as engine:
        assert np.abs(engine.logits(TOKENS) - expected).mean() < 0.003
    source = open_source(str(path))
    assert "model.layers.20.self_attn.k_proj.weight" not in source.names()
    assert source.config["num_kv_shared_layers"] == 2
    assert np.abs(_logits(BlockModel(source)) - expected).mean() < 0.003
    assert GGUFModel(path).metadata["gemma3n.attention.shared_kv_layers"] == 2


@torch.no_grad()
def test_tokens_that_the_table_of_inputs_lacks(deep: tuple[PreTrainedModel, Path]) -> None:
    """They get the first row's inputs, as in transformers."""
    model, folder = deep
    source = open_source(str(folder / "hf"))
    assert source.shape(TABLE) == (512, 22 * 256)
    table = source.read(TABLE)
    assert torch.equal(table[:500], model.model.embed_tokens_per_layer.weight)
    assert torch.equal(table[500:], table[:1].expand(12, -1))
    expected = model(torch.tensor([TOKENS]), use_cache=False).logits[0].numpy()
    assert np.abs(_logits(BlockModel(source)) - expected).max() < 1e-3
