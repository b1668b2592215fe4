"""DeepSeek V4: compressed keys, experts by the number of the token, and four hidden states for each token."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from checkpoint_layouts import fp4_packed
from family_cases import CASES, config_and_shapes, export, make_model, make_tokenizer
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from torch import nn
from transformers import PreTrainedModel

from lqexport.converters.folders.gptq import plan_gptq
from lqexport.converters.gguf.config import Metadata, config_of
from lqexport.converters.gguf.metadata import add_model
from lqexport.converters.gguf.support import check_supported
from lqexport.converters.models.architectures import architecture_of, normalized
from lqexport.converters.models.tensor_names import plain_codec
from lqexport.errors import UserError
from lqexport.evaluation.llamacpp import LlamaCpp
from lqexport.formats.registry import codec_named
from lqexport.models.blocks import BlockModel
from lqexport.models.carried import IDS, TokenIds
from lqexport.models.modules import meta_model
from lqexport.models.source import HuggingFaceSource, open_source
from lqexport.models.source_grids import KEPT
from lqexport.planning.recipe_plan import plan_recipe
from lqexport.recipe import Recipe
from lqexport.target import Target

TABLE = "model.layers.0.mlp.gate.tid2eid"
ALL_BY_NUMBER = {"num_hash_layers": 3}
"""No rounding error sends a token to other experts."""
ONE_BLOCK = {"num_hidden_layers": 1, "num_hash_layers": 1, "layer_types": ["compressed_sparse_attention"]}


def tokens(count: int, seed: int = 0) -> list[int]:
    return [1, *(int(token) for token in np.random.default_rng(seed).integers(3, 480, count - 1))]


def saved(change: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[PreTrainedModel, str]:
    """Returns the model of the case with other options, and the folder that it is saved in."""
    class_name, options, tokenizer = CASES["deepseek-v4"]
    monkeypatch.setitem(CASES, "deepseek-v4", (class_name, options | change, tokenizer))
    model = make_model("deepseek-v4")
    model.save_pretrained(folder / "hf")
    make_tokenizer(tokenizer, folder).save_pretrained(folder / "hf")
    return model, str(folder / "hf")


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: list[list[int]]) -> torch.Tensor:
    return model(torch.tensor(ids), use_cache=False).logits


@pytest.mark.llamacpp
@pytest.mark.parametrize(
    ("change", "count"),
    [(ALL_BY_NUMBER, 270), (ONE_BLOCK | {"index_topk": 8, "index_n_heads": 32}, 60)],
    ids=["two keys of 128 tokens", "8 keys of 14"],
)
def test_llamacpp_attends_to_the_compressed_keys_of_transformers(
    change: dict[str, Any], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, source = saved(change, tmp_path, monkeypatch)
    path = export(tmp_path, Recipe(source, "gguf:F16"))
    with LlamaCpp(path, count, threads=1) as engine:
        logits = engine.logits(tokens(count))
    assert np.abs(logits - logits_of(model, [tokens(count)])[0].numpy()).mean() < 0.003
    table = next(tensor for tensor in GGUFReader(path).tensors if tensor.name == "blk.0.ffn_gate_tid2eid.weight")
    assert table.tensor_type == GGMLQuantizationType.I32
    assert np.array_equal(table.data, model.model.layers[0].mlp.gate.tid2eid.numpy())


def test_blocks_that_run_one_at_a_time_know_the_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second batch of the same shape has other tokens."""
    whole, folder = saved({}, tmp_path, monkeypatch)
    model = BlockModel(open_source(folder))
    batches = [[tokens(140, seed), tokens(140, seed + 1)] for seed in (0, 2)]
    states = [model.start(torch.tensor(batch)) for batch in batches]
    widths = [states[0].shape[-1] - model.hidden_of(states[0]).shape[-1]]
    for _, block in model.blocks():
        states = [model.run(block, each) for each in states]
        widths.append(states[0].shape[-1] - model.hidden_of(states[0]).shape[-1])
    for each, batch in zip(states, batches, strict=True):
        assert torch.allclose(model.logits(each), logits_of(whole, batch), atol=1e-4)
    assert widths == [3, 3, 0, 0]
    assert model.architecture.carried(model.weights.config) == 3 * 64 + 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_type_of_states_holds_the_numbers_of_tokens(dtype: torch.dtype) -> None:
    blocks = nn.ModuleList(nn.Module() for _ in range(2))
    for block, is_hash in zip(blocks, (True, False), strict=True):
        block.mlp = nn.Module()
        block.mlp.is_hash = is_hash  # type: ignore[assignment]
    ids, calls = torch.tensor([[0, 255, 256, 129279, (1 << 24) - 1]]), []

    def call(hidden: torch.Tensor, **named: Any) -> torch.Tensor:
        calls.append(named[IDS])
        return hidden

    kept = TokenIds(2, blocks)
    states, arguments = kept.start(torch.ones(1, 5, 2, dtype=dtype), [((), {IDS: ids})] * 2)
    assert states.dtype == dtype
    assert kept.run(0, states, arguments[0], call).shape[-1] == 2
    assert torch.equal(calls[0], ids)


def test_checkpoints_under_deepseeks_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers writes some of them otherwise than they are published, and a norm under another name."""
    _, folder = saved({}, tmp_path, monkeypatch)
    path = Path(folder) / "model.safetensors"
    written = HuggingFaceSource(Path(folder), "")
    expected = {name: written.read(name) for name in written.names()}
    changes = {r"\.attn\.norm\.": ".attn.kv_norm.", r"^model\.hc_head\.hc_": "hc_head_", r"^model\.": "",
               "^embed_tokens": "embed"}  # fmt: skip
    published = {}
    for name, tensor in safetensors.torch.load_file(path).items():
        for pattern, new in changes.items():
            name = re.sub(pattern, new, name)
        published[name] = tensor
    published["mtp.0.norm.weight"] = torch.ones(64)
    assert {"embed.weight", "norm.weight", "hc_head_fn", "layers.0.attn.kv_norm.weight"} <= set(published)
    safetensors.torch.save_file(published, path)
    source = HuggingFaceSource(Path(folder), "")
    assert set(source.names()) - {"mtp.0.norm.weight"} == set(expected) == set(meta_model(source.config).state_dict())
    assert all(torch.equal(source.read(name), tensor) for name, tensor in expected.items())


def test_weights_as_they_are_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are MXFP4 and other linears FP8; scales are powers of two. Experts move to GGUF's MXFP4 as they are."""
    _, folder = saved({}, tmp_path, monkeypatch)
    path, expected = Path(folder) / "model.safetensors", {}
    stored = safetensors.torch.load_file(path)
    quantized = {name: tensor for name, tensor in stored.items() if re.search(r"\.w[123q][_a-z]*\.weight$", name)}
    for name, tensor in quantized.items():
        scale = name.replace(".weight", ".scale")
        if ".experts." in name:
            powers = tensor.unflatten(1, (-1, 32)).abs().amax(2).log2().ceil().exp2() / 4
            codes, values = fp4_packed(tensor.numpy(), powers.numpy())
            stored[name], expected[name] = codes.view(torch.int8), torch.from_numpy(values)
        else:
            power = tensor.abs().max().log2().ceil().exp2() / 256
            powers = power.repeat(-(-len(tensor) // 128), 1)
            stored[name] = (tensor / power).to(torch.float8_e4m3fn)
            expected[name] = stored[name].float() * power
        stored[scale] = powers.to(torch.float8_e8m0fnu)
    safetensors.torch.save_file(stored, path)
    config = json.loads((Path(folder) / "config.json").read_text())
    settings = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    (Path(folder) / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    source = HuggingFaceSource(Path(folder), "")
    names = {name: source._renamed(name) for name in expected}
    assert "model.layers.0.mlp.experts.3.down_proj.weight" in names.values()
    for name, tensor in expected.items():
        assert torch.equal(source.read(names[name]).float(), tensor)
        is_expert = ".experts." in name
        assert source.dtype(names[name]) == ("mxfp4:g32" if is_expert else "fp8:128x128")
    planned = plan_recipe(source, Recipe(folder, "gguf:MXFP4"))
    kept = {tensor.name for tensor in planned if tensor.source_grid == KEPT}
    assert kept == {new for name, new in names.items() if ".experts." in name}


def test_config_as_it_is_published() -> None:
    """It has one number for each block, and one more for the block that predicts further tokens."""
    yarn = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1}
    given = {"num_hidden_layers": 4, "compress_ratios": [0, 4, 128, 4, 0], "num_hash_layers": 1, "rope_theta": 10000}
    given |= {"qk_rope_head_dim": 32, "head_dim": 512, "rope_scaling": yarn, "compress_rope_theta": 160000}
    hf = transformers.DeepseekV4Config(**json.loads(json.dumps(given)))
    config = normalized(given | {"architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4"})
    assert (config["layer_types"], config["mlp_layer_types"]) == (hf.layer_types, hf.mlp_layer_types)
    made = meta_model(config | {"vocab_size": 8, "n_routed_experts": 2, "hidden_size": 64}).config
    for rope in (made.rope_parameters, hf.rope_parameters):
        rope["compress"].pop("type", None)
    assert made.rope_parameters == hf.rope_parameters
    assert architecture_of(config).per_block["layer_types"] == tuple(hf.layer_types)
    assert normalized({key: config[key] for key in ("architectures", "num_hidden_layers")})["compress_ratios"] == [
        128, 128, 128, 4
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"compress_ratios must be 0, 4 or 128 for each block, not 8\."):
        normalized(given | {"architectures": config["architectures"], "compress_ratios": [0, 4, 8, 4]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["heavily_compressed_attention"] * 3}, "some block is 'compressed_sparse_attention'"),
        ({"mlp_layer_types": ["moe", "hash_moe", "moe"]}, "gives no num_hash_layers"),
        ({"swiglu_limit": 0.0}, "swiglu_limit must be above 0"),
    ],
)
def test_blocks_that_llamacpp_does_not_run(change: dict[str, Any], message: str) -> None:
    config = config_and_shapes("deepseek-v4")[0] | change
    with pytest.raises(UserError, match=message):
        check_supported(architecture_of(config), normalized(config))


def test_files_of_llamacpps_converter() -> None:
    """They leave out the width of MLPs that are no experts, and have a number more for the block of `mtp`."""
    config = normalized(config_and_shapes("deepseek-v4")[0])
    architecture, writer = architecture_of(config), GGUFWriter(None, "deepseek4")
    add_model(writer, architecture, config, 512)
    metadata = {key: value.value for key, value in writer.kv_data[0].items()}
    assert metadata.pop("deepseek4.feed_forward_length") == 32
    assert metadata["deepseek4.attention.compress_ratios"] == [0, 4, 128]
    metadata["deepseek4.attention.compress_ratios"] = [0, 4, 128, 0]
    rebuilt = normalized(config_of(Metadata("file", architecture, metadata), 512, {architecture.output}, {}))
    again = GGUFWriter(None, "deepseek4")
    add_model(again, architecture_of(rebuilt), rebuilt, 512)
    assert again.kv_data == writer.kv_data
    metadata["deepseek4.swiglu_clamp_exp"] = [1.0, 2.0, 1.0]
    with pytest.raises(UserError, match=r"The limits of the experts are \[1\.0, 2\.0\]"):
        config_of(Metadata("file", architecture, metadata), 512, {architecture.output}, {})


def test_tables_of_whole_numbers_are_exact_or_refused() -> None:
    config, shapes = config_and_shapes("deepseek-v4")
    assert plain_codec(architecture_of(config), TABLE) == "gguf-whole:I32"
    codec = codec_named("gguf-whole:I32")
    for wrong in (0.5, float("nan"), 2.0**25):
        with pytest.raises(ValueError, match=r"whole numbers up to 2\^24"):
            codec.encode_values(np.full((1, 2), wrong, np.float32))  # type: ignore[union-attr]
    with pytest.raises(UserError, match="tables of whole numbers"):
        plan_gptq(Target.parse("gptq:4-g32"), config, shapes)
