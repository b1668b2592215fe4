"""Folders in GPTQ's layout and of compressed-tensors, from `quantize` to `verify`, and compared with libraries."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from safetensors.numpy import load_file
from typer.testing import CliRunner

from lqexport.cli.app import app
from lqexport.converters.folders import compressed_tensors, gptq, shards
from lqexport.converters.folders.gptq import GptqModel, plan_gptq
from lqexport.errors import UserError
from lqexport.formats.gptq import GPTQ
from lqexport.models.blocks import BlockModel
from lqexport.models.inspect import inspect
from lqexport.models.source import open_source
from lqexport.models.written import Export, open_export
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.storage.artifact import Artifact
from lqexport.target import Target
from lqexport.verification.verifying import verify

Q_PROJ = "model.layers.1.self_attn.q_proj"
CODEC_NAMES = ["gptq:4-g64", "gptq:4-g128-sym", "gptq:4-row", "gptq:4-g32-act"]
every_codec = pytest.mark.parametrize("codec_name", CODEC_NAMES)
every_plain_codec = pytest.mark.parametrize("codec_name", CODEC_NAMES[:3])
Artifacts = dict[str, Artifact]


@pytest.fixture(scope="module")
def artifacts(tiny_model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """Codec name -> the tiny model's artifact in this codec."""
    artifacts, cache = {}, tmp_path_factory.mktemp("gptq") / "moments"
    for codec_name in CODEC_NAMES:
        recipe = Recipe(str(tiny_model), codec_name, calibration=str(text), samples=2, sequence_length=64,
                        moments="normalized", descent=1, tune=0)  # fmt: skip
        folder = tmp_path_factory.mktemp("gptq") / "artifact"
        quantize(recipe, folder, cache=cache)
        artifacts[codec_name] = Artifact(folder)
    return artifacts


def write(artifact: Artifact, folder: Path, layout: str) -> Path:
    """Writes the artifact as a folder of the layout: "gptq", "gptq_v2" or "compressed-tensors"."""
    if layout == "compressed-tensors":
        compressed_tensors.write(artifact, folder)
    else:
        gptq.write(artifact, folder, v2=layout == "gptq_v2")
    return folder


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2", "compressed-tensors"])
@every_plain_codec
def test_folders_hold_the_artifacts_planes(codec_name: str, layout: str, artifacts: Artifacts, tmp_path: Path) -> None:
    read = open_export(write(artifacts[codec_name], tmp_path / "model", layout))
    assert set(read.names()) == set(artifacts[codec_name].manifest())
    for name in read.names():
        (read_codec_name, planes, shape), stored = read.planes(name), artifacts[codec_name].read(name)
        assert (read_codec_name, shape) == (stored.codec_name, stored.shape)
        assert sorted(planes) == sorted(stored.planes)
        for plane, content in planes.items():
            assert content.dtype == stored.planes[plane].dtype
            assert np.array_equal(content, stored.planes[plane])


def logits(export: Export, tokens: torch.Tensor) -> torch.Tensor:
    model = BlockModel(export)
    with torch.no_grad():
        hidden = model.start(tokens)
        for _, block in model.blocks():
            hidden = model.run(block, hidden)
        return model.logits(hidden[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@every_plain_codec
def test_compressed_tensors_loads_the_same_model(
    codec_name: str, dtype: torch.dtype, artifacts: Artifacts, tmp_path: Path
) -> None:
    """compressed-tensors decompresses the folder in transformers to our weights, bit for bit, and to our logits."""
    pytest.importorskip("compressed_tensors", reason="the package compressed-tensors is not installed")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    folder = write(artifacts[codec_name], tmp_path / "model", "compressed-tensors")
    loading = CompressedTensorsConfig(dequantize=True)
    with pytest.warns(UserWarning, match="quantization_config"):
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=loading)
    weights, ours = theirs.state_dict(), open_export(folder)
    for name in ours.names():
        assert torch.equal(weights[name].float(), ours.read(name).float()), name
    tokens = torch.arange(48)[None] * 7 % 512
    with torch.no_grad():
        assert torch.equal(theirs.float()(tokens).logits[0], logits(ours, tokens))


@every_plain_codec
def test_compressed_tensors_packs_alike(codec_name: str, artifacts: Artifacts, tmp_path: Path) -> None:
    """The compressor of compressed-tensors packs the weights, scales and zero points that it read to the same bytes."""
    base = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    from compressed_tensors.quantization import QuantizationScheme

    folder = write(artifacts[codec_name], tmp_path / "model", "compressed-tensors")
    planes = {name: torch.from_numpy(plane) for name, plane in load_file(folder / "model.safetensors").items()}
    stored = {name.removeprefix(f"{Q_PROJ}."): plane for name, plane in planes.items() if name.startswith(Q_PROJ)}
    scheme = QuantizationScheme(**compressed_tensors.quantization(GPTQ[codec_name])["config_groups"]["group_0"])
    read = base.PackedQuantizationCompressor.decompress(stored, scheme)
    zeros = {name: plane.to(torch.int8) for name, plane in read.items() if name == "weight_zero_point"}
    given = {"weight": read["weight"], "weight_scale": stored["weight_scale"]} | zeros
    packed = base.PackedQuantizationCompressor.compress(given, scheme)
    assert packed.keys() == stored.keys()
    assert all(torch.equal(packed[name], plane) for name, plane in stored.items())


def test_groups_in_act_order_go_to_gptq_alone(artifacts: Artifacts, tmp_path: Path) -> None:
    artifact = artifacts["gptq:4-g32-act"]
    with pytest.raises(UserError, match=r"act-order any more.*gptq:4-g32,"):
        compressed_tensors.write(artifact, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    read = open_export(write(artifact, tmp_path / "model", "gptq"))
    order = read.planes(f"{Q_PROJ}.weight")[1]["g_idx"]
    assert not np.array_equal(order, np.sort(order))
    assert torch.equal(read.read(f"{Q_PROJ}.weight"), open_export(artifact.folder).read(f"{Q_PROJ}.weight"))


@every_codec
def test_the_config_says_what_readers_ask(codec_name: str, artifacts: Artifacts, tmp_path: Path) -> None:
    folder = write(artifacts[codec_name], tmp_path / "model", "gptq")
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float16"
    quantization = config["quantization_config"]
    assert quantization == json.loads((folder / "quantize_config.json").read_text())
    assert (quantization["quant_method"], quantization["bits"], quantization["checkpoint_format"]) == (
        "gptq",
        4,
        "gptq",
    )
    assert quantization["group_size"] == {"g32": 32, "g64": 64, "g128": 128, "row": -1}[codec_name.split("-")[1]]
    assert (quantization["sym"], quantization["desc_act"]) == ("sym" in codec_name, "act" in codec_name)
    stored = load_file(folder / "model.safetensors")
    assert stored[f"{Q_PROJ}.qweight"].shape == (32, 256)
    assert "lm_head.weight" not in stored  # it shares the embedding's weights
    assert {plane.dtype.name for plane in stored.values()} == {"int32", "float16"}
    zeros = stored[f"{Q_PROJ}.qzeros"].view(np.uint32)
    assert np.all(zeros == 0x77777777) == ("sym" in codec_name)
    write(artifacts[codec_name], tmp_path / "other", "gptq_v2")
    v2_zeros = load_file(tmp_path / "other" / "model.safetensors")[f"{Q_PROJ}.qzeros"].view(np.uint32)
    assert np.array_equal(v2_zeros, zeros + np.uint32(0x11111111))
    assert json.loads((tmp_path / "other" / "config.json").read_text())["quantization_config"] == quantization | {
        "checkpoint_format": "gptq_v2"
    }


def test_several_shards_have_an_index(artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 300_000)
    folder = write(artifacts["gptq:4-g64"], tmp_path / "model", "gptq")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(folder / file)
    stored = [plane for path in folder.glob("*.safetensors") for plane in load_file(path).values()]
    assert len(stored) == len(index["weight_map"])
    assert sum(plane.nbytes for plane in stored) == index["metadata"]["total_size"]


def test_verify_compares_every_tensor_and_the_predictions(
    artifacts: Artifacts, tiny_model: Path, text: Path, tmp_path: Path
) -> None:
    artifact = artifacts["gptq:4-g64"]
    folder = write(artifact, tmp_path / "model", "compressed-tensors")
    result = verify(folder, str(tiny_model), text=str(text), windows=1, artifact=artifact.folder, max_kl=0.1)
    assert result.failed == []
    assert all(tensor.same_bytes for tensor in result.tensors)
    assert 0 < result.evaluations[0].kl < 0.1
    path = folder / "model.safetensors"
    stored = load_file(path)
    stored[f"{Q_PROJ}.weight_packed"][3, 5] ^= 1 << 9
    safetensors.numpy.save_file(stored, path)
    result = verify(folder, str(tiny_model), text=str(text), windows=1, artifact=artifact.folder)
    assert any("1 tensors are not those" in sentence and Q_PROJ in sentence for sentence in result.failed)


def test_the_commands(artifacts: Artifacts, tmp_path: Path) -> None:
    artifact = artifacts["gptq:4-g128-sym"]
    packed, folder = "pack-quantized:4-g128-sym", "compressed-tensors folder"
    for command, name, entry_type, container in (("to-gptq", "a", "gptq:4-g128-sym", "GPTQ folder"),
                                                 ("to-gptq", "b", "gptq:4-g128-sym", "GPTQ folder"),
                                                 ("to-compressed-tensors", "c", packed, folder)):  # fmt: skip
        options = ["--v2"] if name == "b" else []
        result = CliRunner().invoke(app, [command, str(artifact.folder), str(tmp_path / name), *options])
        assert result.exit_code == 0, result.output
        assert "verify" in result.output
        contents = inspect(tmp_path / name)
        assert contents.container == container
        assert {entry.type for entry in contents.entries} == {entry_type, "F16"}
        stored = load_file(tmp_path / name / "model.safetensors").values()
        assert sum(entry.nbytes for entry in contents.entries) == sum(plane.nbytes for plane in stored)


# Models, options and folders that are refused.


def test_artifacts_of_other_grids_are_refused(tiny_model: Path, artifacts: Artifacts, tmp_path: Path) -> None:
    quantize(Recipe(str(tiny_model), "native:affine-4-g64", method="rtn"), tmp_path / "affine")
    for layout in ("gptq", "compressed-tensors"):
        with pytest.raises(UserError, match=r"native:affine-4-g64.*whole numbers of scales.*gptq:4-g128"):
            write(Artifact(tmp_path / "affine"), tmp_path / "model", layout)
        assert not (tmp_path / "model").exists()


def test_models_that_the_layout_cannot_hold_are_refused(tiny_model: Path) -> None:
    source = open_source(str(tiny_model))
    shapes = {name: source.shape(name) for name in source.names()}
    down = "model.layers.0.mlp.down_proj.weight"
    planned = {tensor.name: tensor for tensor in plan_gptq(Target.parse("gptq:4-g128"), source.config, shapes)}
    assert (planned[down].codec_name, planned[down].linear) == ("gptq:4-g128", True)
    assert planned["model.embed_tokens.weight"].codec_name == planned["model.norm.weight"].codec_name == "gguf:F16"
    with pytest.raises(UserError, match=r"down_proj.weight, \[256, 576\].* Take gptq:4-g32 or gptq:4-g64 or"):
        plan_gptq(Target.parse("gptq:4-g128"), source.config, shapes | {down: (256, 576)})
    with pytest.raises(UserError, match=r"rows must be a multiple of 32 and columns of 128\.$"):
        plan_gptq(Target.parse("gptq:4-g128"), source.config, shapes | {down: (264, 512)})
    with pytest.raises(UserError, match="Unknown target 'gptq:3-g128'"):
        plan_gptq(Target.parse("gptq:3-g128"), source.config, shapes)


def test_options_that_the_layout_has_no_place_for_are_refused() -> None:
    with pytest.raises(UserError, match="one type for all linears"):
        Recipe("x", "gptq:4-g128", types=["*.down_proj.weight=Q6_K"])
    with pytest.raises(UserError, match="one output group"):
        Recipe("x", "gptq:4-g128", output_groups=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 8}, "Known are 4 bits"),
        ({"group_size": 96}, "would not decode"),
        ({"sym": True}, r"must lie in 8\.\.8"),
        ({"checkpoint_format": "gptq_v2"}, None),
    ],
)
def test_folders_that_say_something_else_are_refused(
    change: dict[str, object], message: str | None, artifacts: Artifacts, tmp_path: Path
) -> None:
    folder = write(artifacts["gptq:4-g64"], tmp_path / "model", "gptq")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    if message is None:  # stores a zero point of 0, which in the older format borrows from its neighbour
        path = folder / "model.safetensors"
        stored = load_file(path)
        stored[f"{Q_PROJ}.qzeros"][0, 0] &= ~15
        safetensors.numpy.save_file(stored, path)
    read = GptqModel(folder)
    with pytest.raises(UserError, match=message or "a zero point .* is 0"):
        read.read(f"{Q_PROJ}.weight")
