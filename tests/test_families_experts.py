"""Models with experts: experts that no token reaches, excluded options, and one type for all experts of a block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from family_cases import CASES, EXPERTS, SIZES, config_and_shapes, export, make_model, make_tokenizer
from family_cases import texts as texts
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from rewritten_files import Content, rewritten
from transformers import AutoModelForCausalLM

from lqexport.checking.opened import open_file
from lqexport.checking.tensor_tables import missing_tensors
from lqexport.converters.gguf.reader import GGUFModel
from lqexport.converters.models.architectures import architecture_of, normalized
from lqexport.converters.models.rope import rotary_dim
from lqexport.converters.targets import plan
from lqexport.errors import UserError
from lqexport.evaluation.llamacpp import LlamaCpp
from lqexport.evaluation.llamacpp_quantizer import quantize as llamacpp_quantize
from lqexport.models.blocks import BlockModel
from lqexport.models.source import HuggingFaceSource
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.storage.config_check import check_config
from lqexport.target import Target


def test_experts_that_no_token_reaches(tmp_path: Path, texts: tuple[str, str]) -> None:
    """All experts have equal router scores, so every token goes to the same two of eight.

    The other experts are solved as if all inputs had the same weight.
    """
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**SIZES | EXPERTS | {"num_experts": 8, "head_dim": 32, "num_hidden_layers": 1})
    model = AutoModelForCausalLM.from_config(config)
    model.model.layers[0].mlp.gate.weight.data.zero_()
    model.save_pretrained(tmp_path / "hf")
    make_tokenizer("gpt-2", tmp_path).save_pretrained(tmp_path / "hf")
    for prefix, moments in (("full", "guided"), ("quantized", "normalized")):
        recipe = Recipe(str(tmp_path / "hf"), "gguf:Q4_0", calibration=texts[0], samples=2, sequence_length=64, tune=0,
                        descent=1, prefix=prefix, moments=moments)  # fmt: skip
        report = quantize(recipe, tmp_path / prefix)
        errors = {t["name"]: t["relative_error"] for t in report["tensors"] if ".experts." in t["name"]}
        assert len(errors) == 24
        assert max(errors.values()) < 0.05


@pytest.mark.parametrize(
    "options", [{"target": "gguf:auto", "size": "5bpw"}, {"asymmetric": True, "prefix": "quantized"}]
)
def test_what_experts_do_not_allow_yet(tmp_path: Path, options: dict[str, Any]) -> None:
    make_model("mixtral").save_pretrained(tmp_path / "hf")
    options = {"target": "gguf:Q4_K", "moments": "guided" if "size" in options else "normalized"} | options
    with pytest.raises(UserError, match="cannot be used for experts"):
        quantize(Recipe(str(tmp_path / "hf"), **options), tmp_path / "out")


def test_experts_of_a_block_share_their_type() -> None:
    config, shapes = config_and_shapes("mixtral")
    everything = plan(Target.parse("gguf:Q8_0"), config, shapes, types={"*.experts.*.down_proj.weight": "gguf:Q4_0"})
    assert {tensor.codec_name for tensor in everything if "down_proj" in tensor.name} == {"gguf:Q4_0"}
    with pytest.raises(UserError, match="experts of a block in one type"):
        plan(Target.parse("gguf:Q8_0"), config, shapes, types={"*.experts.1.down_proj.weight": "gguf:Q4_0"})


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("glm4moe", "model.layers.92.eh_proj.weight"),
        ("glm4moe-air", "model.layers.46.mlp.experts.0.up_proj.weight"),
        ("glm4moe-lite", "model.layers.47.shared_head.norm.weight"),
        ("glm4moe-lite", "model.layers.3.eh_proj.weight"),
        ("ernie4_5-moe", "model.mtp_block.0.mlp.up_proj.weight"),
        ("qwen3_5", "mtp.layers.0.mlp.up_proj.weight"),
        ("llama", "model.mtp.fc.weight"),
    ],
)
def test_blocks_that_predict_further_tokens_are_left_out(name: str, tensor: str) -> None:
    config, shapes = config_and_shapes(name)
    target = Target.parse("gguf:Q4_0")
    assert plan(target, config, shapes | {tensor: (64, 64)}) == plan(target, config, shapes)


def test_blocks_beyond_the_last_one_of_other_models_are_refused() -> None:
    config, shapes = config_and_shapes("llama")
    with pytest.raises(UserError, match=r"num_hidden_layers=2 lacks: model\.layers\.2\.eh_proj\.weight"):
        plan(Target.parse("gguf:Q4_0"), config, shapes | {"model.layers.2.eh_proj.weight": (64, 64)})


def test_experts_that_a_checkpoint_stores_in_one_tensor(tmp_path: Path) -> None:
    model = make_model("granitemoe")
    model.save_pretrained(tmp_path)
    source, block = HuggingFaceSource(tmp_path, ""), model.model.layers[1].block_sparse_moe.experts
    assert not any("input_linear" in name for name in source.names())
    gate, up = block.gate_up_proj[2].chunk(2)
    for linear, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", block.down_proj[2])):
        name = f"model.layers.1.block_sparse_moe.experts.2.{linear}.weight"
        assert torch.equal(source.read(name), weight)
        assert source.shape(name) == tuple(weight.shape)
        (span,) = source.file_spans(name)
        assert span.nbytes == source.nbytes(name)
        stored = span.path.read_bytes()[span.start : span.start + span.nbytes]
        assert stored == weight.detach().numpy().tobytes()


def test_experts_whose_rows_a_checkpoint_stores_in_turns(tmp_path: Path) -> None:
    """gpt-oss: row 2 i is gate_proj's row i, and row 2 i + 1 is up_proj's. Weights are transposed."""
    model = make_model("gpt-oss")
    model.save_pretrained(tmp_path)
    source, block = HuggingFaceSource(tmp_path, ""), model.model.layers[1].mlp.experts
    gate_up, bias = block.gate_up_proj[2].T, block.gate_up_proj_bias[2]
    expected = {"gate_proj.weight": gate_up[::2], "gate_proj.bias": bias[::2]}
    expected |= {"up_proj.weight": gate_up[1::2], "up_proj.bias": bias[1::2]}
    expected |= {"down_proj.weight": block.down_proj[2].T, "down_proj.bias": block.down_proj_bias[2]}
    for end, values in expected.items():
        name = f"model.layers.1.mlp.experts.2.{end}"
        assert torch.equal(source.read(name), values)
        assert source.shape(name) == tuple(values.shape)
        assert source.nbytes(name) == 4 * values.numel()
    stored = {"up_proj.weight": block.gate_up_proj, "up_proj.bias": block.gate_up_proj_bias}
    for end, tensor in (stored | {"down_proj.weight": block.down_proj}).items():
        (span,) = source.file_spans(f"model.layers.1.mlp.experts.2.{end}")
        read = span.path.read_bytes()[span.start : span.start + span.nbytes]
        assert read == tensor[2].detach().numpy().tobytes()


def test_experts_compute_what_transformers_computes(tmp_path: Path) -> None:
    """Inputs are so large that gpt-oss clamps many outputs of gate_proj and up_proj at 7."""
    model = make_model("gpt-oss")
    model.save_pretrained(tmp_path)
    theirs = model.model.layers[0].mlp.experts
    ours = BlockModel(HuggingFaceSource(tmp_path, "")).block(0).get_submodule("mlp.experts")
    hidden = 8 * torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    chosen, weights = torch.tensor([[0, 3]] * 25 + [[2, 1]] * 25), torch.rand(50, 2)
    with torch.no_grad():
        assert (hidden @ theirs.gate_up_proj[0]).abs().gt(7).float().mean() > 0.1
        assert torch.allclose(ours(hidden, chosen, weights), theirs(hidden, chosen, weights), atol=1e-4)


QWEN_EXPERTS = ("qwen3moe", "qwen2moe", "qwen3next")
"""Cases whose config.json may say that some blocks have a gated MLP instead of experts."""


@pytest.mark.parametrize("name", QWEN_EXPERTS)
def test_blocks_without_experts_among_others(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run, and GGUF is refused with the reason."""
    class_name, options, tokenizer = CASES[name]
    sizes = {"mlp_only_layers": [0]} if name == "qwen2moe" else {"decoder_sparse_step": 2}
    monkeypatch.setitem(CASES, name, (class_name, options | sizes, tokenizer))
    model, tokens = make_model(name), torch.arange(3, 40)[None]
    model.save_pretrained(tmp_path)
    source = HuggingFaceSource(tmp_path, "")
    blocks, shapes = BlockModel(source), {key: source.shape(key) for key in source.names()}
    assert "mlp.down_proj" in blocks.linears(0)
    assert not {"mlp.down_proj", "mlp.experts.0.down_proj"} <= {*blocks.linears(0)} & {*blocks.linears(1)}
    states = blocks.start(tokens)
    for _, block in blocks.blocks():
        states = blocks.run(block, states)
    with torch.no_grad():
        assert torch.allclose(blocks.logits(states), model(tokens, use_cache=False).logits, atol=1e-4)
    planned = plan(Target.parse("native:table-4"), source.config, shapes)
    assert "model.layers.0.mlp.up_proj.weight" in {tensor.name for tensor in planned if tensor.linear}
    with pytest.raises(UserError, match=f"llama.cpp computes .* with {next(iter(sizes))}"):
        plan(Target.parse("gguf:F16"), source.config, shapes)


@pytest.mark.llamacpp
@pytest.mark.parametrize("name", [*QWEN_EXPERTS, "qwen3vlmoe"])
def test_llamacpp_does_not_load_such_blocks(name: str, tmp_path: Path) -> None:
    make_model(name).save_pretrained(tmp_path / "hf")
    make_tokenizer("gpt-2", tmp_path).save_pretrained(tmp_path / "hf")
    path = export(tmp_path, Recipe(str(tmp_path / "hf"), "gguf:F16"))
    other = rewritten(path, tmp_path / "dense.gguf", _without_experts_in_the_first_block)
    with pytest.raises(UserError, match=r"blk\.0\.ffn_gate_inp\.weight' not found"), LlamaCpp(other, 8, threads=1):
        pass


def _without_experts_in_the_first_block(content: Content) -> None:
    """Puts a gated MLP in the place of the first block's experts."""
    for name in [name for name in content.tensors if name.startswith("blk.0.ffn_") and "norm" not in name]:
        del content.tensors[name]
    for name, shape in (("gate", (96, 64)), ("up", (96, 64)), ("down", (64, 96))):
        content.tensors[f"blk.0.ffn_{name}.weight"] = np.zeros(shape, np.float32)
        content.forms[f"blk.0.ffn_{name}.weight"] = GGMLQuantizationType.F32


@pytest.mark.llamacpp
def test_llama4_of_128_experts_has_no_norms_of_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp has no key for these norms: it goes by the number of experts."""
    sizes = {"num_local_experts": 128, "use_qk_norm": False, "interleave_moe_layer_step": 4}
    config_class, options, tokenizer = CASES["llama4"]
    monkeypatch.setitem(CASES, "llama4", (config_class, options | sizes, tokenizer))
    model, tokens = make_model("llama4"), list(range(3, 40))
    model.save_pretrained(tmp_path / "hf")
    make_tokenizer("gpt-2", tmp_path).save_pretrained(tmp_path / "hf")
    path = export(tmp_path, Recipe(str(tmp_path / "hf"), "gguf:F16"))
    with torch.no_grad():
        expected = model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    with LlamaCpp(path, 48, threads=1) as engine:
        assert np.abs(engine.logits(tokens) - expected).mean() < 0.003
    assert GGUFModel(path).config["use_qk_norm"] is False


def test_experts_in_one_tensor_of_other_dimensions(tmp_path: Path) -> None:
    model = make_model("granitemoe")
    state = {name: tensor for name, tensor in model.state_dict().items() if "experts" not in name}
    state["model.layers.0.block_sparse_moe.input_linear.weight"] = torch.zeros(4, 64)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="should have 3 dimensions"):
        HuggingFaceSource(tmp_path, "")


@pytest.mark.llamacpp
def test_matrices_of_one_row_that_another_program_stores_as_vectors(tmp_path: Path) -> None:
    """llama.cpp's quantizer drops dimensions of size 1."""
    make_model("qwen2moe").save_pretrained(tmp_path / "hf")
    make_tokenizer("gpt-2", tmp_path).save_pretrained(tmp_path / "hf")
    llamacpp_quantize(
        export(tmp_path, Recipe(str(tmp_path / "hf"), "gguf:F16")), tmp_path / "theirs.gguf", "Q8_0", threads=1
    )
    name = "model.layers.0.mlp.shared_expert_gate.weight"
    ours, theirs = GGUFModel(tmp_path / "F16.gguf"), GGUFModel(tmp_path / "theirs.gguf")
    assert ours.shape(name) == theirs.shape(name) == (1, 64)
    assert (ours.read(name) == theirs.read(name)).all()


def test_hunyuan_gives_numbers_of_each_block() -> None:
    config, shapes = config_and_shapes("hunyuan-moe")
    listed = config | {"moe_topk": [2, 2], "moe_intermediate_size": [96, 96]}
    assert check_config(listed, "config.json") is listed
    assert normalized(listed)["num_experts_per_tok"] == 2
    plan(Target.parse("gguf:Q4_0"), listed, shapes)
    assert normalized(listed | {"moe_topk": [2, 1]})["num_experts_per_tok"] is None


def test_minimax_gives_the_number_of_rotated_columns() -> None:
    config, _ = config_and_shapes("minimax-m2")
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "partial_rotary_factor")}
    assert rotary_dim(normalized(old | {"rotary_dim": 16})) == 16
    assert normalized(old)["rope_theta"] == 5e6


def test_glm_gives_the_types_of_mlps() -> None:
    config, _ = config_and_shapes("glm4moe-lite")
    types = ["dense", "dense", "sparse"]
    assert architecture_of(config | {"mlp_layer_types": types, "first_k_dense_replace": 1}).leading == 2
    assert normalized(config | {"mlp_layer_types": None, "first_k_dense_replace": 2})["mlp_layer_types"] == types
    with pytest.raises(UserError, match="first_k_dense_replace"):
        architecture_of(config | {"mlp_layer_types": ["sparse", "dense", "sparse"]})


@pytest.mark.llamacpp
def test_gate_and_up_projections_in_one_tensor(tmp_path: Path) -> None:
    """llama.cpp's converter writes files of Gemma 4 so. Such a file has the same weights, and nothing is missing."""
    make_model("gemma4-moe").save_pretrained(tmp_path / "hf")
    make_tokenizer("gpt-2", tmp_path).save_pretrained(tmp_path / "hf")
    path = export(tmp_path, Recipe(str(tmp_path / "hf"), "gguf:F16"))
    reader = GGUFReader(path)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    writer = GGUFWriter(tmp_path / "fused.gguf", "gemma4")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            array = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=array)
    for name, data in tensors.items():
        if name.endswith("ffn_up_exps.weight"):
            gate = tensors[name.replace("_up_", "_gate_")]
            writer.add_tensor(name.replace("_up_", "_gate_up_"), np.concatenate([gate, data], 1))
        elif not name.endswith("ffn_gate_exps.weight"):
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, fused = GGUFModel(path), GGUFModel(tmp_path / "fused.gguf")
    assert all((ours.read(name) == fused.read(name)).all() for name in ours.names())
    assert missing_tensors(open_file(tmp_path / "fused.gguf")) == []
    with LlamaCpp(path, 32, threads=1) as engine:
        expected = engine.logits([1, 5, 6, 7])
    with LlamaCpp(tmp_path / "fused.gguf", 32, threads=1) as engine:
        assert np.allclose(engine.logits([1, 5, 6, 7]), expected, atol=1e-3)
