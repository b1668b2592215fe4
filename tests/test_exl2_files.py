"""EXL2 from `quantize` to a verified folder, on a tiny model: sizes, files, resuming, and refused inputs."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from safetensors.numpy import load_file
from typer.testing import CliRunner

from lqexport.cli.app import app
from lqexport.converters.exl2 import writer as exl2_writer
from lqexport.converters.exl2.plan import even_runs, filled_runs, keeps_order, plan_exl2
from lqexport.converters.exl2.reader import Exl2Model
from lqexport.converters.folders import shards
from lqexport.converters.models.architectures import architecture_of
from lqexport.errors import UserError
from lqexport.formats.codec import bits_per_weight
from lqexport.formats.exl2 import Exl2
from lqexport.formats.registry import codec_named
from lqexport.models.inspect import inspect
from lqexport.models.source import open_source
from lqexport.pipeline import exl2_mixes, measured_losses
from lqexport.pipeline.measured_losses import MeasuredLosses
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.storage.artifact import Artifact, StoredTensor
from lqexport.storage.files import write_json
from lqexport.verification.verifying import verify

Q_PROJ = "model.layers.1.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def recipe(tiny_model: Path, text: Path) -> Recipe:
    options = {
        "calibration": str(text),
        "samples": 4,
        "sequence_length": 64,
        "moments": "normalized",
        "descent": 1,
        "tune": 0,
    }
    return Recipe(str(tiny_model), "exl2", bits=3.3, **options)


@pytest.fixture(scope="module")
def artifact(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("exl2") / "artifact"
    quantize(recipe, folder)
    return Artifact(folder)


@pytest.fixture(scope="module")
def folder(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exl2") / "model"
    exl2_writer.write(artifact, path)
    return path


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "log.jsonl"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# Sizes and choices.


def test_the_linears_take_the_bits_that_were_asked_for(artifact: Artifact) -> None:
    report = artifact.report()
    assert 3.2 < report["linears_bits_per_weight"] <= 3.3
    linears = [tensor for tensor in report["tensors"] if "predicted" in tensor]
    weights = sum(np.prod(tensor["shape"]) for tensor in linears)
    assert len(linears) == 14
    assert 8 * sum(tensor["bytes"] for tensor in linears) / weights == report["linears_bits_per_weight"]
    assert len({tensor["codec"].split("+")[0].split("g")[0] for tensor in linears}) > 1  # widths differ


def test_what_was_predicted_is_what_came(artifact: Artifact) -> None:
    """Errors come out near the predicted ones, and somewhat smaller because of descent."""
    tensors = [tensor for tensor in artifact.report()["tensors"] if "predicted" in tensor]
    ratios = [tensor["relative_error"] / tensor["predicted"] for tensor in tensors]
    assert min(ratios) > 0.4
    assert max(ratios) < 1.05
    predicted = artifact.report()["allocation"]["predicted"]
    assert predicted == pytest.approx(sum(tensor["predicted"] for tensor in tensors))


def test_the_choice_costs_less_than_even_widths(artifact: Artifact, recipe: Recipe, tmp_path: Path) -> None:
    """Among the measured options of every linear, the pure width of 3 bits takes nearly the same bytes."""
    tensors = {tensor["name"]: tensor for tensor in artifact.report()["tensors"]}
    losses = json.loads((artifact.folder / "mixes.json").read_text())
    options = {name: measured_losses.options(tried, tuple(tensors[name]["shape"])) for name, tried in losses.items()}
    even = [next(option for option in tried if option.name.startswith("exl2:3g32x")
                 and "+" not in option.name) for tried in options.values()]  # fmt: skip
    assert sum(option.nbytes for option in even) >= 0.98 * sum(tensors[name]["bytes"] for name in options)
    chosen = sum(tensors[name]["predicted"] for name in options)
    assert chosen < 0.95 * sum(option.loss for option in even)


@pytest.mark.parametrize("shape", [(32, 32), (192, 576), (768, 1536), (4096, 14336)])
def test_even_widths_fill_their_budget(shape: tuple[int, int]) -> None:
    least, most = (bits_per_weight(codec_named(f"exl2:{bits}g32x{shape[1] // 32}"), *shape) for bits in (2, 8))
    for bits in np.linspace(least, most, 17):
        spent = bits_per_weight(Exl2(even_runs(shape, bits * shape[0] * shape[1] / 8)), *shape)
        assert bits - 2 * 32 / shape[1] < spent <= bits + 1e-9


@pytest.mark.parametrize("average", [2.0, 2.3, 3.0, 4.7, 6.0, 8.0])
def test_filled_widths_meet_their_average_and_beat_even_ones(average: float) -> None:
    importance = np.exp(-np.linspace(0, 6, 48))
    runs = filled_runs(importance, average)
    widths = np.repeat([run.bits for run in runs], [run.count for run in runs])
    assert average - 2 / 48 <= widths.mean() <= average
    if average in (3.0, 6.0):
        assert (importance * 4.0**-widths).sum() < 0.8 * (importance * 4.0**-average).sum()


@pytest.mark.parametrize("importance", [np.zeros(8), np.ones(8), np.array([1.0, 0, 5, 0, 0, 0, 0, 9])])
def test_filled_widths_fall_whatever_the_importances(importance: np.ndarray) -> None:
    assert sum(run.columns for run in Exl2(filled_runs(importance, 3.5)).runs) == 256


@pytest.mark.parametrize("bits", [1.5, 8.5])
def test_a_size_that_cannot_be_reached_names_those_that_can(recipe: Recipe, bits: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"from 2\.\d+ to 8\.\d+ can be reached"):
        quantize(replace(recipe, bits=bits), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", [2.5, 8.2])
def test_sizes_at_the_ends_are_reached(
    recipe: Recipe, bits: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exl2_mixes, "AVERAGES", ())  # only pure widths, to save time
    report = quantize(replace(recipe, bits=bits, samples=1, descent=0, head_bits=16), tmp_path / "out")
    assert bits - 0.12 < report["linears_bits_per_weight"] <= bits


# The folder.


def test_the_folder_is_what_exllamav2_loads(folder: Path, artifact: Artifact, recipe: Recipe) -> None:
    assert {path.name for path in folder.iterdir()} >= {"config.json", "tokenizer.json", "model.safetensors"}
    assert not list(folder.glob("*.index.json"))
    config = json.loads((folder / "config.json").read_text())
    expected = {"rows": 4, "length": 64, "dataset": recipe.calibration}
    assert config["quantization_config"].pop("calibration") == expected
    assert config["quantization_config"] == {"quant_method": "exl2", "version": "0.3.2", "bits": 3.3, "head_bits": 6}
    stored = load_file(folder / "model.safetensors")
    key = "lm_head"  # the source's output shares the embedding's weights; the folder holds it separately
    dtypes = {"q_weight": "int32", "q_scale": "int32", "q_scale_max": "float16", "q_groups": "int16",
              "q_invperm": "int32"}  # fmt: skip
    assert {name: stored[f"{key}.{name}"].dtype.name for name in dtypes} == dtypes
    assert {plane.dtype.name for plane in stored.values()} == {"int32", "int16", "float16"}
    assert f"{Q_PROJ}.weight" not in stored
    assert stored["model.norm.weight"].shape == (256,)


def test_a_layer_read_slowly_from_the_shard_is_the_artifacts(folder: Path, artifact: Artifact) -> None:
    """Decodes weight by weight, as the format is described, with NumPy's float16."""
    stored = {name.removeprefix(f"{Q_PROJ}."): plane for name, plane in load_file(folder / "model.safetensors").items()
              if name.startswith(Q_PROJ)}  # fmt: skip
    tensor = artifact.read(f"{Q_PROJ}.weight")
    values = codec_named(tensor.codec_name).decode(tensor.planes, 256)
    table = [*stored["q_groups"].astype(int).reshape(-1, 2), (0, len(stored["q_weight"]))]
    position = 0
    for group, ((bits, line), (_, end)) in enumerate(pairwise(table)):
        for row in (0, 7, 255):
            words = stored["q_weight"][line:end, row].astype("<i4").tobytes()
            stream = int.from_bytes(words, "little")
            sub = int(stored["q_scale"][group, row // 8]) >> (4 * (row % 8)) & 15
            scale = np.float16((sub + 1) ** 2) * (stored["q_scale_max"][group] / np.float16(256))
            for k in range((end - line) * 32 // bits):
                column = int(np.flatnonzero(stored["q_invperm"] == position + k)[0])
                code = (stream >> int(bits * k) & (2 ** int(bits) - 1)) - 2 ** int(bits - 1)
                assert np.float32(np.float16(code) * scale) == values[row, column]
        position += (end - line) * 32 // bits


def test_equal_artifacts_give_equal_bytes_in_shards_too(
    artifact: Artifact, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exl2_writer.write(artifact, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)
    monkeypatch.setattr(shards, "SHARD_BYTES", 300_000)
    exl2_writer.write(artifact, tmp_path / "shards")
    names = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert names == [f"model-{i:05}-of-{len(names):05}.safetensors" for i in range(1, len(names) + 1)]
    assert len(names) > 2
    whole, parts = Exl2Model(folder), Exl2Model(tmp_path / "shards")
    assert parts.names() == whole.names()
    assert all(np.array_equal(parts.read(name), whole.read(name)) for name in whole.names())


def test_a_folder_that_cannot_be_finished_leaves_nothing(artifact: Artifact, tmp_path: Path) -> None:
    def stop(name: str, _: int) -> None:
        if name == DOWN:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exl2_writer.write(artifact, tmp_path / "model", stop)
    assert not list(tmp_path.iterdir())


def test_inspect_shows_bits_per_layer(folder: Path, artifact: Artifact) -> None:
    contents = inspect(folder)
    entries = {entry.name: entry for entry in contents.entries}
    assert contents.container == "ExLlamaV2 folder"
    for tensor in artifact.report()["tensors"]:
        assert (entries[tensor["name"]].type, entries[tensor["name"]].nbytes) == (tensor["codec"], tensor["bytes"])


def test_verify_compares_every_tensor_and_the_predictions(
    folder: Path, artifact: Artifact, tiny_model: Path, text: Path
) -> None:
    result = verify(folder, str(tiny_model), text=str(text), windows=1, artifact=artifact.folder, max_kl=0.1)
    assert result.failed == []
    assert all(tensor.same_bytes for tensor in result.tensors)
    assert not [warning for warning in result.warnings if "architecture" in warning]
    assert 0 < result.evaluations[0].kl < 0.1


def test_verify_finds_a_changed_byte(copied: Path, artifact: Artifact, tiny_model: Path, text: Path) -> None:
    path = copied / "model.safetensors"
    stored = load_file(path)
    stored[f"{Q_PROJ}.q_weight"][3, 5] ^= 1 << 9
    safetensors.numpy.save_file(stored, path)
    result = verify(copied, str(tiny_model), text=str(text), windows=1, artifact=artifact.folder)
    assert any("1 tensors are not those" in sentence and f"{Q_PROJ}.weight" in sentence for sentence in result.failed)


@pytest.mark.parametrize(
    ("name", "plane", "message"),
    [
        (f"{Q_PROJ}.q_groups", np.array([2, 0, 4, 2], np.int16), "would not decode"),
        (f"{Q_PROJ}.q_invperm", np.zeros(256, np.int32), "each of 0..255 once"),
        (f"{Q_PROJ}.q_scale_max", np.zeros(1, np.float16), "must be float16"),
        ("model.layers.0.self_attn.k_norm.weight", np.zeros(64, np.float16), "does not have"),
    ],
)
def test_damaged_folders_are_refused(copied: Path, name: str, plane: np.ndarray, message: str) -> None:
    path = copied / "model.safetensors"
    safetensors.numpy.save_file(load_file(path) | {name: plane}, path)
    with pytest.raises(UserError, match=message):
        Exl2Model(copied).read(f"{Q_PROJ}.weight")


def test_left_over_and_missing_files_are_refused(copied: Path) -> None:
    path = copied / "model.safetensors"
    shutil.copyfile(path, copied / "consolidated.safetensors")
    with pytest.raises(UserError, match="twice"):
        Exl2Model(copied)
    (copied / "consolidated.safetensors").unlink()
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="cut short"):
        Exl2Model(copied)
    path.unlink()
    with pytest.raises(UserError, match=r"no \.safetensors"):
        Exl2Model(copied)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output + result.stderr
    return result.stdout


def test_the_commands(artifact: Artifact, folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    planned = run("quantize", tiny_model, tmp_path / "out", "--target", "exl2", "--bits", "3.3", "--dry-run")
    assert "Widths: even here" in planned
    assert "lm_head.weight" in planned
    assert "verify" in run("to-exl2", artifact.folder, tmp_path / "model")
    assert contents(tmp_path / "model") == contents(folder)
    assert artifact.manifest()[DOWN]["codec"] in run("inspect", folder, "--verbose")


# Resuming.


def test_interrupted_anywhere_resumes_to_the_same_bytes(
    artifact: Artifact, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents(artifact.folder)
    for owner, method, stop in ((MeasuredLosses, "add", 1), (Artifact, "write", 12)):
        out, left, original = tmp_path / f"{method}{stop}", [stop], getattr(owner, method)

        def until(*arguments: object, left: list[int] = left, original: object = original) -> None:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            original(*arguments)  # type: ignore[operator]

        monkeypatch.setattr(owner, method, until)
        with pytest.raises(KeyboardInterrupt):
            quantize(recipe, out)
        monkeypatch.setattr(owner, method, original)
        quantize(recipe, out)
        assert contents(out) == expected


def test_a_run_killed_while_it_cleans_up_leaves_nothing_for_good(
    artifact: Artifact, recipe: Recipe, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(artifact.folder, out)
    write_json(out / "work" / "moments" / "key" / "facts.json", {})
    quantize(recipe, out)
    assert contents(out) == contents(artifact.folder)


# What is refused or avoided.


def shapes_of(model: Path) -> tuple[dict, dict[str, tuple[int, ...]]]:
    source = open_source(str(model))
    return dict(source.config), {name: source.shape(name) for name in source.names()}


def test_an_output_of_its_own_is_quantized_or_kept(tiny_model: Path) -> None:
    config, shapes = shapes_of(tiny_model)
    tied = {bits: plan_exl2(config, shapes, bits=4, head_bits=bits)[-1] for bits in (6, 16)}
    assert (tied[6].name, tied[6].codec_name) == ("lm_head.weight", "exl2:6g32x8")
    assert tied[16].name == "model.norm.weight"  # ExLlamaV2 then takes the embedding
    config, shapes = config | {"tie_word_embeddings": False}, shapes | {"lm_head.weight": (500, 256)}
    *_, odd = plan_exl2(config, shapes, bits=4, head_bits=6)
    assert (odd.codec_name, odd.linear, odd.reason) == ("gguf:F16", False, "500 rows are not a multiple of 32")
    with pytest.raises(UserError, match="lm_head"):
        plan_exl2(config, shapes, bits=4, head_bits=6, fallback=False)
    with pytest.raises(UserError, match="not 7"):
        plan_exl2(config, shapes, bits=4, head_bits=7)


def test_layers_that_exllamav2_computes_wrongly_are_refused(tiny_model: Path) -> None:
    config, shapes = shapes_of(tiny_model)
    with pytest.raises(UserError, match=r"down_proj.weight is \[256, 272\], not multiples of 32"):
        plan_exl2(config, shapes | {DOWN: (256, 272)}, bits=4, head_bits=6)
    with pytest.raises(UserError, match="at most 65535 columns"):
        plan_exl2(config, shapes | {DOWN: (256, 2**16)}, bits=4, head_bits=6)


def test_biases_on_permuted_columns_are_avoided(tiny_model: Path, artifact: Artifact, tmp_path: Path) -> None:
    """ExLlamaV2 reorders gate_proj's and up_proj's outputs by down_proj's order, but not their biases."""
    source = open_source(str(tiny_model))
    architecture, biased = architecture_of(source.config), source.config | {"mlp_bias": True}
    assert keeps_order(architecture, biased, DOWN)
    assert not keeps_order(architecture, biased, f"{Q_PROJ}.weight")
    assert not keeps_order(architecture, source.config, DOWN)
    copy = Artifact(Path(shutil.copytree(artifact.folder, tmp_path / "biased")))
    (copy.model_folder / "config.json").write_text(json.dumps(biased))
    with pytest.raises(UserError, match="biases"):
        exl2_writer.write(copy, tmp_path / "model")


def test_a_model_with_such_biases_keeps_the_order(tiny_model: Path, recipe: Recipe, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "biased"))
    config = json.loads((model / "config.json").read_text()) | {"mlp_bias": True}
    (model / "config.json").write_text(json.dumps(config))
    stored = load_file(model / "model.safetensors")
    for layer in (0, 1):
        for module, width in {"gate": 512, "up": 512, "down": 256}.items():
            stored[f"model.layers.{layer}.mlp.{module}_proj.bias"] = np.full(width, 0.01, np.float16)
    safetensors.numpy.save_file(stored, model / "model.safetensors", {"format": "pt"})
    quantize(replace(recipe, source=str(model), samples=1, descent=0), tmp_path / "out")
    exl2_writer.write(Artifact(tmp_path / "out"), tmp_path / "model")
    written = load_file(tmp_path / "model" / "model.safetensors")
    orders = {name: plane for name, plane in written.items() if name.endswith("q_invperm")}
    for name, order in orders.items():
        assert np.array_equal(order, np.arange(len(order))) == ("down_proj" in name)
    assert written["model.layers.0.mlp.up_proj.bias"].dtype == np.float16


def change(tensor: StoredTensor) -> StoredTensor:
    planes = tensor.planes | {"q_scale": tensor.planes["q_scale"] ^ 1}
    return replace(tensor, planes=planes)


def test_artifacts_that_are_not_exl2_or_damaged_are_refused(
    artifact: Artifact, recipe: Recipe, tiny_model: Path, tmp_path: Path
) -> None:
    quantize(Recipe(str(tiny_model), "gguf:Q4_0", method="rtn"), tmp_path / "gguf")
    with pytest.raises(UserError, match="cannot become an EXL2 folder"):
        exl2_writer.write(Artifact(tmp_path / "gguf"), tmp_path / "model")
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="exists"):
        exl2_writer.write(artifact, tmp_path / "model")
    copy = Artifact(Path(shutil.copytree(artifact.folder, tmp_path / "copy")))
    copy.write(change(copy.read(DOWN)))
    with pytest.raises(UserError, match="damaged"):
        exl2_writer.write(copy, tmp_path / "other")
    (copy.model_folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        exl2_writer.write(copy, tmp_path / "other")
    config = copy.config() | {"architectures": ["LlamaForCausalLM", "LlamaForCausalLM"]}
    (copy.model_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="exactly one architecture"):
        exl2_writer.write(copy, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_options_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(UserError, match="needs --bits"):
        Recipe("x", "exl2")
    with pytest.raises(UserError, match="needs --bits"):
        Recipe("x", "gguf:Q4_K", bits=4)
    with pytest.raises(UserError, match="head-bits"):
        Recipe("x", "exl2", bits=4, output_type="Q6_K")
    with pytest.raises(UserError, match="one output group"):
        Recipe("x", "exl2", bits=4, moments="guided", output_groups=2)


def test_guided_moments_predict_nats_and_tuning_keeps_the_grid(recipe: Recipe, tmp_path: Path) -> None:
    changed = replace(recipe, moments="guided", tune=2, samples=2, descent=0)
    report = quantize(changed, tmp_path / "out")
    linears = [tensor for tensor in report["tensors"] if "predicted" in tensor]
    achieved = sum(0.5 * tensor["loss"] for tensor in linears)
    assert achieved == pytest.approx(report["allocation"]["predicted"], rel=0.1)
    assert "tuning" in report
    exl2_writer.write(Artifact(tmp_path / "out"), tmp_path / "model")
    assert Exl2Model(tmp_path / "model").names()[-1] == "lm_head.weight"


def test_rounding_needs_no_calibration(recipe: Recipe, tmp_path: Path) -> None:
    report = quantize(replace(recipe, method="rtn", calibration="nothing of this name"), tmp_path / "out")
    assert 3.0 < report["linears_bits_per_weight"] <= 3.3
    exl2_writer.write(Artifact(tmp_path / "out"), tmp_path / "model")
    read = Exl2Model(tmp_path / "model").codec_name(f"{Q_PROJ}.weight")
    assert read == Artifact(tmp_path / "out").manifest()[f"{Q_PROJ}.weight"]["codec"]


# Low rank.


@pytest.mark.parametrize("target", ["exl2", "gptq:4-g64-sym"])
def test_corrections_go_beside_the_base(
    target: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Corrections fit the error that the stored grid leaves, under the same Hessian.

    Base and adapter are verified together.
    """
    monkeypatch.setattr(exl2_mixes, "AVERAGES", ())  # only pure widths, to save time
    exl2_only = {"bits": 2.5} if target == "exl2" else {"bits": None}
    changed = replace(recipe, target=target, rank=16, samples=2, **exl2_only)
    report = quantize(changed, tmp_path / "out")
    artifact = Artifact(tmp_path / "out")
    corrections = {tensor["name"]: tensor["correction"] for tensor in report["tensors"] if "correction" in tensor}
    assert len(corrections) == 14  # the output has none
    assert all(facts["losses"][-1] < 0.8 * facts["losses"][0] for facts in corrections.values())
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    printed = run("to-exl2" if target == "exl2" else "to-gptq", artifact.folder, base)
    assert "to-peft" in printed
    assert not any("lora" in name for path in base.glob("*.safetensors") for name in load_file(path))
    run("to-peft", artifact.folder, adapter)
    result = verify(base, recipe.source, text=recipe.calibration, windows=1, artifact=artifact.folder, adapter=adapter)
    assert result.failed == []
    assert result.evaluations[0].kl < 0.9 * result.base_evaluations[0].kl
    whole = verify(artifact.folder, recipe.source, text=recipe.calibration, windows=1)
    assert whole.evaluations[0].kl == result.evaluations[0].kl
