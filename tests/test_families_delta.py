"""Gated delta nets (Qwen3-Next, Qwen3.5): fused linears in parts, value heads in two orders, folders of safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_layouts import coded, gptq_tensors
from family_cases import CASES, config_and_shapes, export, make_model, make_tokenizer
from family_cases import texts as texts
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lqexport
from lqexport.converters.models.architectures import architecture_of, normalized
from lqexport.converters.models.value_heads import TILED, fused_parts, tiled_after
from lqexport.converters.targets import plan
from lqexport.errors import UserError
from lqexport.models.blocks import BlockModel
from lqexport.models.column_order import in_order
from lqexport.models.modules import expected_shapes
from lqexport.models.source import HuggingFaceSource, open_source
from lqexport.models.source_grids import KEPT, with_moves
from lqexport.models.written import open_export
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.target import Target

GGUF = Target.parse("gguf:Q4_0")
TOKENS = torch.tensor([[1, *range(20, 60)]])
OUT_PROJ, Z = "model.layers.0.linear_attn.out_proj.weight", "model.layers.0.linear_attn.in_proj_z.weight"
FUSED = "model.layers.0.linear_attn.in_proj_qkvz"
SIZES = {"linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 2, "linear_value_head_dim": 1}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Qwen3.5 in `hf`, whose value heads are more than its key heads, and its F16.gguf."""
    folder = tmp_path_factory.mktemp("dense")
    make_model("qwen3_5").save_pretrained(folder / "hf")
    make_tokenizer(CASES["qwen3_5"][2], folder).save_pretrained(folder / "hf")
    export(folder, Recipe(str(folder / "hf"), "gguf:F16"))
    return folder


@torch.no_grad()
def logits(weights: Any) -> torch.Tensor:
    model = BlockModel(weights)
    hidden = model.start(TOKENS)
    for _, block in model.blocks():
        hidden = model.run(block, hidden)
    return model.logits(hidden)


def test_value_heads_take_turns() -> None:
    assert tiled_after(1, 7, SIZES).tolist() == [0, 1, 4, 2, 5, 3, 6]
    assert tiled_after(0, 12, SIZES).tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    with pytest.raises(UserError, match="14 rows are no 6 value heads of 2 key heads"):
        tiled_after(0, 14, SIZES)


def test_rows_of_the_parts_of_a_fused_linear() -> None:
    """Each of two key heads has the rows of a query (2), a key (2), three values and three gates."""
    parts = {name: rows.tolist() for name, rows in fused_parts(SIZES).items()}
    assert parts == {"qkv": [0, 1, 10, 11, 2, 3, 12, 13, 4, 5, 6, 14, 15, 16], "z": [7, 8, 9, 17, 18, 19]}
    with pytest.raises(UserError, match="5 is no multiple of linear_num_key_heads 2"):
        fused_parts(SIZES | {"linear_num_value_heads": 5})


def test_columns_change_places_for_gguf_alone(dense: Path) -> None:
    source = open_source(str(dense / "hf"))
    tiled = in_order(source, tiled=True)
    assert in_order(source, tiled=False) is source
    assert tiled.config[TILED]
    assert not torch.equal(tiled.read(OUT_PROJ), source.read(OUT_PROJ))
    assert torch.equal(tiled.read(Z), source.read(Z))
    assert torch.equal(in_order(tiled, tiled=False).read(OUT_PROJ), source.read(OUT_PROJ))
    assert torch.allclose(logits(tiled), logits(source), atol=1e-5)
    file = open_source(str(dense / "F16.gguf"))
    assert torch.equal(file.read(OUT_PROJ), tiled.read(OUT_PROJ).half().float())
    assert torch.equal(file.read(Z), source.read(Z).half().float())


def test_native_folder_of_a_gguf_file_runs_in_transformers(dense: Path) -> None:
    """Its columns come back into transformers' order, and its convolution into transformers' shape."""
    quantize(Recipe(str(dense / "F16.gguf"), "native:affine-8-g32", method="rtn"), dense / "native")
    folder = lqexport.export(dense / "native", dense / "native-folder")
    expected = logits(open_source(str(dense / "F16.gguf")))
    written = logits(open_export(folder))
    assert (written - expected).abs().mean() < 0.03 * expected.std()
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS, use_cache=False).logits
    assert torch.allclose(loaded, written, atol=1e-4)


def test_fused_linear_of_a_checkpoint_of_other_sizes_is_refused(tmp_path: Path) -> None:
    make_model("qwen3next").save_pretrained(tmp_path)
    assert HuggingFaceSource(tmp_path, "").shape(f"{FUSED}.z.weight") == (4 * 32, 64)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"linear_num_value_heads": 8}))
    with pytest.raises(UserError, match=r"in_proj_qkvz\.weight has 384 rows, where by config.json it has 640"):
        HuggingFaceSource(tmp_path, "")


def with_gptq(folder: Path, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Stores linears of a checkpoint in GPTQ's layout; returns the values that they should decode to."""
    stored, values = load_file(folder / "model.safetensors"), {}
    for name in names:
        linear = coded(stored.pop(name).numpy(), 4, 32, symmetric=True)
        stored |= gptq_tensors(name.removesuffix(".weight"), linear)
        values[name] = torch.from_numpy(linear.values)
    save_file(stored, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return values


def test_quantized_weights_move_unless_their_columns_change_places(tmp_path: Path) -> None:
    make_model("qwen3_5").save_pretrained(tmp_path)
    values = with_gptq(tmp_path, (OUT_PROJ, Z))
    for tiled, expected in ((False, [KEPT, KEPT]), (True, [None, KEPT])):
        source = in_order(open_source(str(tmp_path)), tiled)
        shapes = {name: source.shape(name) for name in source.names()}
        planned = {tensor.name: tensor for tensor in with_moves(source, plan(GGUF, source.config, shapes))}
        assert [planned[name].source_grid for name in (OUT_PROJ, Z)] == expected
        assert torch.equal(in_order(source, tiled=False).read(OUT_PROJ), values[OUT_PROJ])


def test_parts_of_a_quantized_fused_linear_are_decoded(tmp_path: Path) -> None:
    make_model("qwen3next").save_pretrained(tmp_path)
    values = with_gptq(tmp_path, (f"{FUSED}.weight",))[f"{FUSED}.weight"]
    source = HuggingFaceSource(tmp_path, "")
    for part, rows in fused_parts(source.config).items():
        name = f"{FUSED}.{part}.weight"
        assert torch.equal(source.read(name), values[torch.from_numpy(rows)])
        assert source.shape(name) == (len(rows), 64)
        assert source.module(name) is None
        assert source.dtype(name) == "gptq:4-g32-sym"
        assert {span.path for span in source.file_spans(name)} == {tmp_path / "model.safetensors"}


def test_types_of_blocks_follow_from_the_interval() -> None:
    config, _ = config_and_shapes("qwen3_5")
    lacking = {key: value for key, value in config.items() if key != "layer_types"} | {"num_hidden_layers": 5}
    types = normalized(lacking | {"full_attention_interval": 2})["layer_types"]
    assert types == normalized(lacking | {"layer_types": types})["layer_types"] == architecture_types(lacking, 2)
    assert architecture_types(lacking, 4) == ["linear_attention"] * 3 + ["full_attention", "linear_attention"]


def architecture_types(config: dict[str, Any], interval: int) -> list[str]:
    return list(architecture_of(config | {"full_attention_interval": interval}).per_block["layer_types"])


def test_attention_in_no_regular_interval_is_refused() -> None:
    config, _ = config_and_shapes("qwen3_5")
    config |= {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "full_attention"]}
    shapes = expected_shapes(config)
    with pytest.raises(UserError, match=r"config\.json gives no full_attention_interval"):
        plan(GGUF, config, shapes)
    plan(Target.parse("native:table-4"), config, shapes)


def test_peft_adapter_of_columns_in_another_order_is_refused(dense: Path, texts: tuple[str, str]) -> None:
    """A GGUF adapter of the same artifact is written: its columns are in the order of the file's."""
    recipe = Recipe(str(dense / "hf"), "gguf:Q4_0", method="rtn", rank=4, calibration=texts[0], samples=2,
                    sequence_length=32)  # fmt: skip
    quantize(recipe, dense / "corrected")
    lqexport.export(dense / "corrected", dense / "corrected.gguf", adapter=dense / "adapter.gguf")
    with pytest.raises(UserError, match=r"out_proj\.weight has its columns in llama\.cpp's order"):
        lqexport.export(dense / "corrected", dense / "peft", format="peft")
    assert not (dense / "peft").exists()
