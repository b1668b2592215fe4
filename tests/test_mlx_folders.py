"""MLX folders, from `quantize` to `verify`, and beside mlx-lm where it is installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from family_cases import config_and_shapes, make_model, make_tokenizer
from typer.testing import CliRunner

from lqexport.cli.app import app
from lqexport.converters.folders import shards
from lqexport.converters.mlx import writer
from lqexport.converters.mlx.plan import plan_mlx
from lqexport.converters.mlx.reader import MlxModel
from lqexport.delivery.deliver import export_model
from lqexport.errors import UserError
from lqexport.evaluation import mlx_lm
from lqexport.evaluation.mlx_process import MlxFailed, MlxProcess
from lqexport.models.blocks import BlockModel
from lqexport.models.inspect import inspect
from lqexport.models.interface import Weights
from lqexport.models.source import Source, open_source
from lqexport.models.source_grids import KEPT
from lqexport.models.written import open_export
from lqexport.pipeline.quantize import quantize
from lqexport.planning.recipe_plan import plan_recipe
from lqexport.recipe import Recipe
from lqexport.storage.artifact import Artifact, decoded
from lqexport.target import Target
from lqexport.verification.verifying import verify

Q_PROJ, EMBEDDING = "model.layers.1.self_attn.q_proj", "model.embed_tokens.weight"
TEMPLATE = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"


@pytest.fixture(scope="module")
def source(smaller_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smaller model in bfloat16, with its output tied to the embedding, and with a chat template."""
    folder = retyped(smaller_model, tmp_path_factory.mktemp("mlx") / "source", torch.bfloat16, tied=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def retyped(model: Path, folder: Path, dtype: torch.dtype, tied: bool) -> Path:
    """Copies a model in another dtype; `tied` says whether its output is its embedding."""
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state = {name: tensor.to(dtype) for name, tensor in state.items() if not (tied and name == "lm_head.weight")}
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"dtype": str(dtype).removeprefix("torch."), "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def recipe_of(source: Path, text: Path, **options: Any) -> Recipe:
    usual = {"target": "mlx:3-g64", "samples": 4, "sequence_length": 32, "descent": 1, "tune": 0}
    return Recipe(str(source), calibration=str(text), **usual | options)


@pytest.fixture(scope="module")
def artifact(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A bfloat16 model with down projections of 6 bits, the rest of 3."""
    folder = tmp_path_factory.mktemp("mlx") / "artifact"
    quantize(recipe_of(source, text, types=["*.down_proj.weight=mlx:6-g32"]), folder)
    return Artifact(folder)


@pytest.fixture(scope="module")
def folder(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mlx") / "written"
    writer.write(artifact, folder)
    return folder


def test_the_folder_decodes_to_the_artifact(artifact: Artifact, folder: Path) -> None:
    model = open_export(folder)
    assert model.names() == list(artifact.manifest())
    for name in model.names():
        stored = artifact.read(name)
        assert np.array_equal(model.read(name).numpy(), decoded(stored))
        assert model.planes(name)[0] == stored.codec_name
    assert {entry.type for entry in inspect(folder).entries} == {"mlx:3-g64", "mlx:6-g32", "gguf:BF16"}


def test_config_json_says_what_mlx_lm_needs(folder: Path, artifact: Artifact) -> None:
    config = json.loads((folder / "config.json").read_text())
    usual = {"group_size": 64, "bits": 3, "mode": "affine"}
    assert usual.items() <= config["quantization"].items()
    apart = {name: entry for name, entry in config["quantization"].items() if name not in usual}
    assert set(apart) == {name.removesuffix(".weight") for name in artifact.manifest() if "down_proj" in name}
    assert all(entry == {"group_size": 32, "bits": 6, "mode": "affine"} for entry in apart.values())
    assert config["quantization"] == config["quantization_config"]
    assert config["tie_word_embeddings"] is True
    assert config["rope_theta"] == 10000.0
    assert config["rope_scaling"] is None


def test_the_embedding_that_is_the_output_is_solved(artifact: Artifact) -> None:
    """Its facts are those of a linear, and the blocks are solved on what it gives."""
    assert artifact.read(EMBEDDING).facts["relative_error"] < 0.5
    assert "loss" in artifact.read(f"{Q_PROJ}.weight").facts


def check_values(source: Source, folder: Weights) -> None:
    """Asserts that a folder as a source has the tensors that it has as an export, bit for bit."""
    assert set(source.names()) == set(folder.names())
    for name in folder.names():
        assert source.shape(name) == folder.shape(name)
        assert torch.equal(source.read(name).float(), folder.read(name).float())


def test_a_folder_is_a_source(folder: Path, text: Path, tmp_path: Path) -> None:
    again = open_source(str(folder))
    check_values(again, open_export(folder))
    assert again.dtype(f"{Q_PROJ}.weight") == "mlx:3-g64"
    assert sum(map(again.nbytes, again.names())) == sum(entry.nbytes for entry in inspect(folder).entries)
    quantize(recipe_of(folder, text, target="gguf:Q8_0", method="rtn"), tmp_path / "out", device="cpu")
    assert "quantization" not in Artifact(tmp_path / "out").config()


@pytest.mark.parametrize(
    ("change", "message"), [({"bits": 7}, "MLX has no mode affine of 7 bits"), ({"bits": 5}, "whole groups of 64")]
)
def test_a_source_with_wrong_settings_is_refused(
    change: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        open_source(str(with_settings(folder, change, tmp_path))).shape(f"{Q_PROJ}.weight")


def with_settings(folder: Path, change: dict[str, Any], copy: Path) -> Path:
    """Copies a folder and changes `quantization` of its config.json."""
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    config["quantization"] |= change
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_verify_passes_the_folder(folder: Path, source: Path, artifact: Artifact) -> None:
    result = verify(folder, str(source), windows=1, artifact=artifact.folder, device="cpu")
    assert not result.failed
    assert all(tensor.same_bytes for tensor in result.tensors)
    assert result.family == "mlx"


def test_shards_have_an_index(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    writer.write(artifact, tmp_path / "written")
    index = json.loads((tmp_path / "written" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert f"{Q_PROJ}.biases" in index["weight_map"]
    assert np.array_equal(open_export(tmp_path / "written").read(EMBEDDING), decoded(artifact.read(EMBEDDING)))


def test_float16_models_have_float16_scales(smaller_model: Path, text: Path, tmp_path: Path) -> None:
    """Its output has weights of its own; the solver works on them, and the embedding is rounded."""
    source = retyped(smaller_model, tmp_path / "source", torch.float16, tied=False)
    quantize(recipe_of(source, text, target="mlx:4-g64"), tmp_path / "out")
    writer.write(Artifact(tmp_path / "out"), tmp_path / "written")
    stored = safetensors.torch.load_file(tmp_path / "written" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.uint32, torch.float16}
    manifest = Artifact(tmp_path / "out").manifest()
    assert {entry["codec"] for entry in manifest.values()} == {"mlx:4-g64-f16", "mlx:4-g32-f16", "gguf:F16"}
    check_values(open_source(str(tmp_path / "written")), open_export(tmp_path / "written"))
    assert "loss" in Artifact(tmp_path / "out").read("lm_head.weight").facts
    assert "loss" not in Artifact(tmp_path / "out").read(EMBEDDING).facts


def test_types_by_size_keep_within_it(source: Path, text: Path, tmp_path: Path) -> None:
    report = quantize(recipe_of(source, text, target="mlx:auto", size="4.5bpw", samples=2), tmp_path / "out")
    assert report["budget"]["tensor_bytes"] <= report["budget"]["limit_bytes"]
    codecs = {tensor["codec"] for tensor in report["tensors"]} - {"gguf:BF16"}
    assert len(codecs) > 1
    assert all(codec.startswith("mlx:") for codec in codecs)
    artifact, written = Artifact(tmp_path / "out"), tmp_path / "written"
    writer.write(artifact, written)
    assert open_export(written).names() == list(artifact.manifest())
    if mlx_lm.is_installed():
        import mlx_lm as theirs

        for name, module in theirs.load(str(written))[0].named_modules():
            if "Quantized" in type(module).__name__:
                assert artifact.manifest()[f"{name}.weight"]["codec"] == f"mlx:{module.bits}-g{module.group_size}"


def test_tuning_moves_bfloat16_numbers(source: Path, text: Path, tmp_path: Path) -> None:
    report = quantize(recipe_of(source, text, target="mlx:2-g32", tune=8, tune_rate=0.02), tmp_path / "out")
    assert report["tuning"]["kept"]
    tuned = Artifact(tmp_path / "out").read(f"{Q_PROJ}.weight")
    assert tuned.facts["tuned"]
    writer.write(Artifact(tmp_path / "out"), tmp_path / "written")
    assert np.array_equal(open_export(tmp_path / "written").read(f"{Q_PROJ}.weight").numpy(), decoded(tuned))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "mlx:7-g64"}, "Unknown target 'mlx:7-g64'"),
        ({"target": "mlx:4-g64-f16"}, "Unknown target"),
        ({"types": ["*.down_proj.weight=Q4_K"]}, "MLX has no type gguf:Q4_K"),
        ({"embedding_type": "gguf:Q8_0"}, "MLX has no type gguf:Q8_0"),
        ({"types": ["*.no_such=mlx:4-g64"]}, "No matrix of the model"),
        ({"target": "mlx:4-g128", "fallback": False}, "mlx:4-g128 cannot hold"),
    ],
)
def test_wrong_targets_and_types_are_refused(options: dict[str, Any], message: str, source: Path, text: Path) -> None:
    with pytest.raises(UserError, match=message):
        plan_recipe(open_source(str(source)), recipe_of(source, text, **options))


def test_widths_that_no_group_divides_take_smaller_groups(source: Path, text: Path) -> None:
    planned = plan_recipe(open_source(str(source)), recipe_of(source, text, target="mlx:4-g128"))
    fallen = {tensor.codec_name for tensor in planned if tensor.reason}
    assert fallen
    assert fallen <= {"mlx:4-g64", "mlx:4-g32"}


def test_plain_fallbacks_have_the_dtype_of_the_model() -> None:
    config, shapes = config_and_shapes("llama")
    name = "model.layers.0.mlp.down_proj.weight"
    shapes |= {name: (shapes[name][0], 40)}
    planned = plan_mlx(Target.parse("mlx:mxfp4"), config | {"dtype": "float16"}, shapes)
    assert next(tensor.codec_name for tensor in planned if tensor.name == name) == "gguf:F16"


def test_other_artifacts_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    quantize(Recipe(str(tiny_model), "gguf:Q8_0", method="rtn"), tmp_path / "out")
    with pytest.raises(UserError, match="cannot become an MLX folder by moving bytes"):
        writer.write(Artifact(tmp_path / "out"), tmp_path / "written")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"bits": 7}, "No format of MLX"), ({"bits": 4}, "damaged|rightly|must be"), ({"mode": "mxfp4"}, "No format")],
)
def test_a_folder_whose_settings_are_wrong_is_refused(
    change: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        open_export(with_settings(folder, change, tmp_path)).read(f"{Q_PROJ}.weight")


def test_the_command_line_goes_the_whole_way(artifact: Artifact, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["to-mlx", str(artifact.folder), str(tmp_path / "written")])
    assert result.exit_code == 0, result.output
    assert "lqexport verify" in result.output
    assert MlxModel(tmp_path / "written").names() == list(artifact.manifest())


def test_targets_are_spelled_in_small_letters() -> None:
    assert str(Target.parse("MLX:4-G64")) == "mlx:4-g64"
    assert Target.parse("mlx:auto").is_auto
    assert (Target.parse("mlx:4-g64").bits, Target.parse("mlx:mxfp8").bits, Target.parse("exl2").bits) == (4, 8, None)


needs_mlx = pytest.mark.skipif(not mlx_lm.is_installed(), reason=mlx_lm.MISSING)


@needs_mlx
def test_mlx_lm_loads_and_generates(folder: Path) -> None:
    """Unmodified, as a user calls it."""
    import mlx_lm as theirs

    model, tokenizer = theirs.load(str(folder))[:2]
    talk = tokenizer.apply_chat_template([{"role": "user", "content": "the quick"}], tokenize=False)
    assert talk == "user the quick "
    assert theirs.generate(model, tokenizer, "the quick", max_tokens=8).strip()
    assert type(model.layers[0].mlp.down_proj).__name__ == "QuantizedLinear"
    assert model.layers[0].mlp.down_proj.bits == 6
    assert model.model.embed_tokens.bits == 3


@needs_mlx
def test_logits_in_mlx_are_those_of_our_decoding(folder: Path) -> None:
    tokens = list(range(5, 45))
    model = BlockModel(open_export(folder))
    with torch.no_grad():
        state = model.start(torch.tensor([tokens]))
        for _, block in model.blocks():
            state = model.run(block, state)
        ours = model.logits(state)[0].numpy()
    with MlxProcess(folder) as engine:
        assert np.allclose(engine.logits(tokens), ours, atol=1e-4 * ours.std())
        assert np.allclose(engine.logits(tokens, 30), ours[30:], atol=1e-4 * ours.std())
        (said,) = engine.continuation(tokens, 1)
    assert ours[-1].max() - ours[-1][said] < 0.1 * ours.std()  # mlx multiplies in bfloat16 there


@needs_mlx
def test_verify_runs_the_folder_in_mlx(folder: Path, source: Path) -> None:
    result = verify(folder, str(source), windows=1, engine="mlx", device="cpu")
    assert not result.failed
    assert result.versions["mlx-lm"]
    own = verify(folder, str(source), windows=1, device="cpu")
    assert result.evaluations[0].kl == pytest.approx(own.evaluations[0].kl, rel=1e-3)
    assert result.talk is not None
    assert result.talk.continuations


@needs_mlx
def test_a_folder_that_mlx_lm_does_not_load_fails(folder: Path, source: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "no_such_model"}))
    with pytest.raises(MlxFailed, match=r"mlx-lm does not load .*no_such_model"), MlxProcess(tmp_path):
        pass


@needs_mlx
def test_export_verifies_in_mlx(source: Path, text: Path, tmp_path: Path) -> None:
    done = export_model(recipe_of(source, text, target="mlx:6-g64"), tmp_path / "model-6bit", windows=1, device="cpu")
    assert done.passed, done.verification.failed
    assert done.verification.engine == "mlx"
    assert "mlx_lm.chat" in (done.record / "README.md").read_text()


def test_the_engine_is_refused_where_it_cannot_run(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"mlx-lm runs MLX folders, and .* is none"):
        verify(source, str(source), engine="mlx")
    monkeypatch.setattr(mlx_lm, "is_installed", lambda: False)
    with pytest.raises(UserError, match="mlx-lm is not installed"):
        verify(folder, str(source), engine="mlx")


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_modes_of_small_floats(mode: str, source: Path, tmp_path: Path) -> None:
    quantize(Recipe(str(source), f"mlx:{mode}", method="rtn"), tmp_path / "out", device="cpu")
    writer.write(Artifact(tmp_path / "out"), tmp_path / "written")
    stored = safetensors.torch.load_file(tmp_path / "written" / "model.safetensors")
    assert stored[f"{Q_PROJ}.scales"].dtype == torch.uint8
    assert f"{Q_PROJ}.biases" not in stored
    expected = decoded(Artifact(tmp_path / "out").read(f"{Q_PROJ}.weight"))
    assert np.array_equal(open_export(tmp_path / "written").read(f"{Q_PROJ}.weight").numpy(), expected)
    again = open_source(str(tmp_path / "written"))
    check_values(again, open_export(tmp_path / "written"))
    planned = plan_recipe(again, Recipe(again.name, f"gguf:{mode.upper()}" if mode != "mxfp8" else "gguf:Q8_0"))
    reasons = {tensor.source_grid for tensor in planned if tensor.name == f"{Q_PROJ}.weight"}
    assert reasons == {KEPT if mode != "mxfp8" else "its values are rounded to 16 bits"}
    if mlx_lm.is_installed():
        import mlx.core as mx
        import mlx_lm as theirs

        module = theirs.load(str(tmp_path / "written"))[0].layers[1].self_attn.q_proj
        values = mx.dequantize(module.weight, module.scales, None, module.group_size, module.bits, module.mode)
        assert np.array_equal(np.array(values.astype(mx.float32)), expected)


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "mamba2"])
def test_models_that_mlx_lm_computes_otherwise_are_refused(name: str) -> None:
    config, shapes = config_and_shapes(name)
    with pytest.raises(UserError, match=r"MLX folders of .* are not written"):
        plan_mlx(Target.parse("mlx:4-g64"), config, shapes)


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("mistral", {"sliding_window": 16}, "without sliding windows, and by config.json each has 16 of 512"),
        ("mixtral", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "no rope scaling of type 'yarn'"),
        ("granite", {"hidden_act": "gelu"}, "mlx-lm computes GraniteForCausalLM with hidden_act"),
        ("gemma3", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "every n-th block"),
    ],
)
def test_settings_that_mlx_lm_computes_otherwise_are_refused(name: str, change: dict[str, Any], sentence: str) -> None:
    config, shapes = config_and_shapes(name)
    plan_mlx(Target.parse("mlx:4-g64"), config, shapes)
    with pytest.raises(UserError, match=sentence):
        plan_mlx(Target.parse("mlx:4-g64"), config | change, shapes)


def test_experts_share_tensors(tmp_path: Path) -> None:
    """mlx-lm has those of a block in one tensor, under a name of its own."""
    make_model("mixtral").bfloat16().save_pretrained(tmp_path / "source")
    make_tokenizer("llama-bpe", tmp_path).save_pretrained(tmp_path / "source")
    quantize(Recipe(str(tmp_path / "source"), "mlx:4-g32", method="rtn"), tmp_path / "out", device="cpu")
    writer.write(Artifact(tmp_path / "out"), tmp_path / "written")
    stored = safetensors.torch.load_file(tmp_path / "written" / "model.safetensors")
    stack, one = "model.layers.0.block_sparse_moe.switch_mlp.up_proj", "model.layers.0.mlp.experts.{}.up_proj.weight"
    assert stored[f"{stack}.weight"].ndim == 3
    with pytest.raises(UserError, match="as mlx-lm stacks them, which is not read as a source"):
        open_source(str(tmp_path / "written"))
    model, artifact = open_export(tmp_path / "written"), Artifact(tmp_path / "out")
    for expert in (0, 2):
        name = one.format(expert)
        assert np.array_equal(model.read(name).numpy(), decoded(artifact.read(name)))
        assert model.shape(name) == artifact.read(name).shape


def test_experts_in_several_types_are_refused() -> None:
    config, shapes = config_and_shapes("mixtral")
    types = {"*.experts.1.up_proj.weight": "mlx:3-g32"}
    with pytest.raises(UserError, match="experts of a block in one type"):
        plan_mlx(Target.parse("mlx:4-g32"), config, shapes, types_by_name=types)


@needs_mlx
@pytest.mark.parametrize("name", ["gemma3", "phi3", "deepseek-v2", "mixtral"])
def test_families_compute_as_transformers_does(
    name: str, load_script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    """tools/mlx_models.py does it for all. These have windows, rope scaling, and experts that both sides stack."""
    assert load_script("tools/mlx_models.py").largest_difference(name, tmp_path) < 1e-4
