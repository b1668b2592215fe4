"""Checkpoints that other tools have quantized, as sources: they are read, moved to other targets, or solved again.

The results are compared with what gguf, libgguf and compressed-tensors decode.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import libgguf
import numpy as np
import pytest
import torch
from checkpoint_layouts import (
    DOWN,
    ROW,
    Checkpoint,
    Made,
    Make,
    Tensors,
    coded,
    fp8_tensors,
    gptq_tensors,
    leanquant_tensors,
    same_bits,
)
from checkpoint_layouts import make as make
from checkpoint_layouts import make_awq as make_awq
from checkpoint_layouts import make_gptq as make_gptq
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lqexport.cli.app import app
from lqexport.converters.folders import native
from lqexport.converters.gguf import writer as gguf_writer
from lqexport.errors import UserError
from lqexport.formats.moves import TableGrid, move
from lqexport.formats.registry import codec_named
from lqexport.models.inspect import inspect
from lqexport.models.source import open_source
from lqexport.models.written import open_export
from lqexport.pipeline.quantize import quantize
from lqexport.planning.recipe_plan import plan_recipe
from lqexport.recipe import Recipe
from lqexport.storage.artifact import Artifact
from lqexport.verification.verifying import verify


def check_lossless(checkpoint: Checkpoint, target: str, out: Path) -> Artifact:
    """Quantizes without calibration. Asserts that every tensor decodes to the checkpoint's values."""
    recipe = Recipe(str(checkpoint.folder), target)
    quantize(recipe, out)
    artifact = Artifact(out)
    assert artifact.run()["calibration"] is None
    entries = {entry["name"]: entry for entry in artifact.report()["tensors"]}
    export = open_export(out)
    assert set(export.names()) == set(checkpoint.values)
    for name, values in checkpoint.values.items():
        assert same_bits(export.read(name).numpy(), values), name
        assert entries[name].get("source_grid") == ("kept" if "proj" in name else None)
        assert entries[name]["codec"] == target or "proj" not in name
    return artifact


def check_gguf(artifact: Artifact, checkpoint: Checkpoint, path: Path) -> None:
    """Asserts that gguf (NumPy) and libgguf (ggml in C) decode four linears of the file to the checkpoint's values."""
    gguf_writer.write(artifact, path)
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    gguf_names = {"mlp.down_proj": "ffn_down", "mlp.up_proj": "ffn_up", "self_attn.v_proj": "attn_v",
                  "self_attn.q_proj": "attn_q"}  # fmt: skip
    for module, name in gguf_names.items():
        tensor = tensors[f"blk.1.{name}.weight"]
        expected = checkpoint.values[f"model.layers.1.{module}.weight"]
        if name == "attn_q":  # llama.cpp rotates neighbours: rows 0 32 1 33 ... of each head of 64
            expected = expected.reshape(4, 2, 32, 256).swapaxes(1, 2).reshape(256, 256)
        blocks, tensor_type = np.array(tensor.data), GGMLQuantizationType(tensor.tensor_type)
        assert same_bits(dequantize(blocks, tensor_type), expected)
        assert same_bits(libgguf.dequantize_rows(blocks, tensor_type), expected)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_leanquant_tables_move_to_native_ones(bits: int, dtype: torch.dtype, make: Make, tmp_path: Path) -> None:
    checkpoint = make(lambda name, weight: leanquant_tensors(name, weight, bits, dtype), None)
    artifact = check_lossless(checkpoint, f"native:table-{bits}", tmp_path / "out")
    native.write(artifact, tmp_path / "model")
    export = open_export(tmp_path / "model")
    assert all(same_bits(export.read(name).numpy(), values) for name, values in checkpoint.values.items())
    wider = move(TableGrid(np.zeros((3, 2**bits), np.float32), 8), codec_named("native:table-4"))
    assert wider.grid.levels.shape == (3, 16)


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "v2", "target"),
    [
        (4, 128, True, False, "gguf:Q4_0"),
        (4, 32, False, False, "gguf:Q5_0"),
        (4, 0, False, True, "gguf:Q4_K"),
        (3, 64, False, True, "gguf:Q4_1"),
        (2, 0, False, False, "gguf:Q2_K"),
        (8, 128, True, True, "gguf:Q8_0"),
    ],
)
def test_gptq_moves_to_gguf(
    bits: int, group: int, symmetric: bool, v2: bool, target: str, make_gptq: Make, tmp_path: Path
) -> None:
    checkpoint = make_gptq(bits, group, symmetric, v2=v2)
    check_gguf(check_lossless(checkpoint, target, tmp_path / "out"), checkpoint, tmp_path / "model.gguf")


def test_awq_moves_to_gguf(make_awq: Make, tmp_path: Path) -> None:
    checkpoint = make_awq()
    check_gguf(check_lossless(checkpoint, "gguf:Q5_0", tmp_path / "out"), checkpoint, tmp_path / "model.gguf")


def test_awq_of_fitting_mins_moves_to_q4_1(make_awq: Make, tmp_path: Path) -> None:
    checkpoint = make_awq(powers=True)
    check_gguf(check_lossless(checkpoint, "gguf:Q4_1", tmp_path / "out"), checkpoint, tmp_path / "model.gguf")


def test_awq_reads_as_compressed_tensors_converts_it(make_awq: Make) -> None:
    """The converter of compressed-tensors knows the order in which AutoAWQ packs rows."""
    autoawq = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq")
    checkpoint = make_awq()
    stored = load_file(checkpoint.folder / "model.safetensors")
    theirs = decompressed(autoawq.AutoAWQConverter().process(stored), DOWN, {"num_bits": 4, "symmetric": False})
    ours = open_source(str(checkpoint.folder)).read(f"{DOWN}.weight")
    assert torch.equal(ours.half(), theirs)
    with pytest.raises(UserError, match="quantized by awq: `lqexport quantize` moves"):
        open_export(checkpoint.folder)


@pytest.mark.parametrize("target", ["native:affine-5-g128", "native:affine-8-g32", "gptq:4-g128", "gptq:4-g32"])
def test_gptq_moves_to_native_and_to_itself(target: str, make_gptq: Make, tmp_path: Path) -> None:
    checkpoint = make_gptq()
    if target.startswith("native:"):
        check_lossless(checkpoint, target, tmp_path / "out")
        return
    quantize(Recipe(str(checkpoint.folder), target), tmp_path / "out")
    values = checkpoint.values[f"{DOWN}.weight"].astype(np.float16)  # as readers of the layout compute
    stored = Artifact(tmp_path / "out").read(f"{DOWN}.weight")
    assert same_bits(open_export(tmp_path / "out").read(f"{DOWN}.weight").numpy(), values.astype(np.float32))
    theirs = load_file(checkpoint.folder / "model.safetensors")
    assert np.array_equal(stored.planes["qweight"], theirs[f"{DOWN}.qweight"].numpy())
    if target == "gptq:4-g128":
        for plane, array in stored.planes.items():
            assert np.array_equal(array, theirs[f"{DOWN}.{plane}"].numpy()), plane


def compression(weights: dict[str, Any]) -> dict[str, Any]:
    quantization_args = {"type": "int", "strategy": "group", "group_size": 128, "dynamic": False} | weights
    return {"targets": ["Linear"], "weights": quantization_args}


def decompressed(
    stored: Tensors, name: str, weights: dict[str, Any], format_name: str = "pack-quantized"
) -> torch.Tensor:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    parts = {key.removeprefix(f"{name}."): tensor for key, tensor in stored.items() if key.startswith(f"{name}.")}
    compressor = BaseCompressor.get_value_from_registry(format_name)
    return compressor.decompress(parts, QuantizationScheme(**compression(weights)))["weight"]


@pytest.mark.parametrize(
    ("format_name", "dtype", "weights", "target"),
    [
        ("pack-quantized", torch.bfloat16, {"num_bits": 4, "symmetric": True}, "gguf:Q4_0"),
        ("pack-quantized", torch.float16, {"num_bits": 4, "symmetric": False}, "gguf:Q5_0"),
        ("pack-quantized", torch.float16, {"num_bits": 3, "symmetric": False} | ROW, "gguf:Q4_K"),
        ("pack-quantized", torch.float16, {"num_bits": 8, "symmetric": True}, "gguf:Q8_0"),
        ("int-quantized", torch.bfloat16, {"num_bits": 8, "symmetric": True} | ROW, "gguf:Q8_0"),
        ("float-quantized", torch.bfloat16, {"num_bits": 8, "symmetric": True, "type": "float"} | ROW, None),
    ],
)
def test_compressed_tensors_reads_as_its_library_does(
    format_name: str, dtype: torch.dtype, weights: dict[str, Any], target: str | None, make: Make, tmp_path: Path
) -> None:
    """compressed-tensors makes the checkpoint, and decompresses it for comparison."""
    pytest.importorskip("compressed_tensors", reason="the package compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme(**compression(weights))
    compressor = BaseCompressor.get_value_from_registry(format_name)

    def tensors_of(name: str, weight: NDArray[np.float32]) -> Made:
        group = 0 if weights.get("strategy") == "channel" else 128
        linear = coded(weight, weights["num_bits"], group, weights["symmetric"])
        middle = 2 ** (linear.bits - 1)
        given = {"weight": torch.from_numpy(weight).to(dtype), "weight_scale": torch.from_numpy(linear.scale).to(dtype)}
        if weights.get("type") == "float":
            given["weight_scale"] = given["weight"].abs().amax(1, keepdim=True) / 448
        if not weights["symmetric"]:
            given["weight_zero_point"] = torch.from_numpy(linear.zero - middle).to(torch.int8)
        parts = compressor.compress(given, scheme)
        exact = compressor.decompress(parts | {"weight_scale": parts["weight_scale"].float()}, scheme)["weight"]
        return {f"{name}.{part}": tensor for part, tensor in parts.items()}, exact.numpy()

    quantization = {"quant_method": "compressed-tensors", "format": format_name, "config_groups": {"group_0": None}}
    checkpoint = make(tensors_of, quantization)
    source = open_source(str(checkpoint.folder))
    assert all(same_bits(source.read(name).float().numpy(), values) for name, values in checkpoint.values.items())
    stored = load_file(checkpoint.folder / "model.safetensors")
    assert torch.equal(source.read(f"{DOWN}.weight").to(dtype), decompressed(stored, DOWN, weights, format_name))
    if target:
        check_lossless(checkpoint, target, tmp_path / "out")


@pytest.mark.parametrize("block", [[128, 128], [96, 80]])
def test_fp8_is_read_and_solved_again(block: list[int], make: Make, text: Path, tmp_path: Path) -> None:
    """Covers blocks of 96 x 80, of which the last ones are smaller. transformers does not read those."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    quantization = {"quant_method": "fp8", "weight_block_size": block, "activation_scheme": "dynamic"}
    checkpoint = make(lambda name, weight: fp8_tensors(name, weight, *block), quantization)
    source = open_source(str(checkpoint.folder))
    assert set(source.names()) == checkpoint.values.keys()
    assert all(same_bits(source.read(name).float().numpy(), values) for name, values in checkpoint.values.items())
    if block == [128, 128]:
        stored = load_file(checkpoint.folder / "model.safetensors")
        codes, scale = stored[f"{DOWN}.weight"], stored[f"{DOWN}.weight_scale_inv"]
        theirs = Fp8Dequantize(None)._dequantize_one(codes, scale)
        assert same_bits(source.read(f"{DOWN}.weight").float().numpy(), theirs.numpy())
    options = {"calibration": str(text), "samples": 2, "sequence_length": 32, "tune": 0}
    quantize(Recipe(str(checkpoint.folder), "gguf:Q8_0", **options), tmp_path / "out")
    gguf_writer.write(Artifact(tmp_path / "out"), tmp_path / "model.gguf")
    result = verify(tmp_path / "model.gguf", str(checkpoint.folder), text=str(text), windows=1)
    assert result.failed == []
    assert result.evaluations[0].kl < 0.001


# The commands.


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_commands_take_a_checkpoint(make_gptq: Make, text: Path, tmp_path: Path) -> None:
    checkpoint = make_gptq(symmetric=True)
    output = run("quantize", checkpoint.folder, tmp_path / "out", "--target", "gguf:Q4_0", "--dry-run")
    assert "14 tensors move to gguf:Q4_0 as they are" in output
    assert "solved again" not in output
    output = run("quantize", checkpoint.folder, tmp_path / "out", "--target", "gguf:Q4_K", "--dry-run")
    assert "14 tensors are solved again" in output
    assert "256 columns share one; gguf:Q4_0 would hold it" in " ".join(output.split())
    run("quantize", checkpoint.folder, tmp_path / "out", "--target", "gguf:Q4_0")
    run("to-gguf", tmp_path / "out", tmp_path / "model.gguf")
    result = verify(
        tmp_path / "model.gguf", str(checkpoint.folder), text=str(text), windows=1, artifact=tmp_path / "out"
    )
    assert result.failed == []
    assert {tensor.weight_error for tensor in result.tensors} == {0.0}
    assert result.evaluations[0].kl == 0
    listed = inspect(checkpoint.folder)
    assert (listed.container, listed.entries[0].type) == ("GPTQ folder", "F16")
    assert {entry.type for entry in listed.entries if "proj" in entry.name} == {"gptq:4-g128-sym"}
    stored = load_file(checkpoint.folder / "model.safetensors").values()
    assert sum(entry.nbytes for entry in listed.entries) == sum(tensor.nbytes for tensor in stored)
    assert "hours" in run("plan", checkpoint.folder, "--target", "gguf:Q4_0", "--json")
    # AutoGPTQ gave the file another name, and the quantization config a file of its own.
    (checkpoint.folder / "model.safetensors").rename(checkpoint.folder / "gptq_model-4bit-128g.safetensors")
    config = json.loads((checkpoint.folder / "config.json").read_text())
    (checkpoint.folder / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (checkpoint.folder / "config.json").write_text(json.dumps(config))
    (checkpoint.folder / "._gptq_model-4bit-128g.safetensors").touch()  # macOS leaves such files on other disks
    again = open_source(str(checkpoint.folder))
    assert same_bits(again.read(f"{DOWN}.weight").numpy(), checkpoint.values[f"{DOWN}.weight"])
    # A resumed run that would read it otherwise is another run.
    before, path = again.fingerprint, checkpoint.folder / "quantize_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sym": False}))
    assert open_source(str(checkpoint.folder)).fingerprint != before


@pytest.mark.parametrize("model_type", ["mixtral", "gpt2"])
def test_names_and_shapes_are_those_of_the_model(model_type: str, tmp_path: Path) -> None:
    """A checkpoint of Mixtral stores its experts one by one, under other names.

    GPT-2 stores linears transposed, and a GPTQ checkpoint of it does not.
    """
    from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}
    if model_type == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, **sizes))
    else:
        model = MixtralForCausalLM(MixtralConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                                                 num_attention_heads=2, num_local_experts=2, **sizes))  # fmt: skip
    model.half().save_pretrained(tmp_path)
    float_source = open_source(str(tmp_path))
    originals = {name: float_source.read(name).float() for name in float_source.names()}
    linear = re.compile(r"(proj|\.w[123]|c_attn|c_fc)\.weight$")
    stored: Tensors = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        if not linear.search(name):
            stored[name] = tensor
            continue
        weight = (tensor.T if model_type == "gpt2" else tensor).float().numpy()
        stored |= gptq_tensors(name.removesuffix(".weight"), coded(weight, 8, 32, True))
    save_file({name: part.contiguous() for name, part in stored.items()}, tmp_path / "model.safetensors")
    method = {"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": True}
    (tmp_path / "quantize_config.json").write_text(json.dumps(method))
    source = open_source(str(tmp_path))
    assert set(source.names()) == set(originals)
    for name, original in originals.items():
        assert source.shape(name) == original.shape
        assert torch.allclose(source.read(name).float(), original, atol=1e-3), name
    planned = plan_recipe(source, Recipe(str(tmp_path), "gguf:Q8_0"))
    assert sum(tensor.source_grid == "kept" for tensor in planned) == {"mixtral": 10, "gpt2": 4}[model_type]
    # The advice names no K-quant, since 256 does not divide the columns.
    too_few = plan_recipe(source, Recipe(str(tmp_path), "gguf:Q4_0"))
    advised = [tensor for tensor in too_few if (tensor.source_grid or "").endswith("; gguf:Q8_0 would hold it")]
    assert len(advised) == {"mixtral": 10, "gpt2": 4}[model_type]
