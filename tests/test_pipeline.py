"""`quantize` from end to end on a tiny model: what is stored, resuming, and bad input."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch

from lqexport.converters.gguf.reader import GGUFModel
from lqexport.converters.gguf.writer import write
from lqexport.errors import UserError
from lqexport.formats.gguf import WITH_SCALE
from lqexport.formats.registry import codec_named
from lqexport.models.blocks import BlockModel
from lqexport.models.source import open_source
from lqexport.pipeline import kept_states, sequential, solve_model
from lqexport.pipeline.quantize import quantize
from lqexport.planning import output_folder
from lqexport.planning.dryrun import preview
from lqexport.recipe import Recipe
from lqexport.runtime.progress import Callback
from lqexport.storage import files
from lqexport.storage.artifact import Artifact, StoredTensor


@pytest.fixture
def recipe(tiny_model: Path, text: Path) -> Recipe:
    return Recipe(str(tiny_model), "gguf:Q3_K", calibration=str(text), samples=6, sequence_length=64, tune=5,
                  moments="normalized", prefix="full")  # fmt: skip


def changed(recipe: Recipe, **options: object) -> Recipe:
    return Recipe(**{**recipe.__dict__, **options})


def contents(folder: Path) -> dict[str, str]:
    """Returns path -> digest, for every file but the log, which holds times."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "log.jsonl"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    "target", ["gguf:Q2_K", "gguf:IQ4_XS", "gguf:Q4_K_M", "gguf:F16", "native:table-3", "native:affine-4-g128"]
)
@pytest.mark.parametrize("method", ["rtn", "gptq", "lean"])
def test_every_tensor_is_stored_near_its_source(recipe: Recipe, target: str, method: str, tmp_path: Path) -> None:
    tune = 5 if method == "lean" else 0  # tuning is the same for all methods
    report = quantize(changed(recipe, target=target, method=method, tune=tune), tmp_path / "out")
    stored = Artifact(tmp_path / "out")
    source = open_source(recipe.source)
    assert set(stored.manifest()) == set(source.names()) - {"lm_head.weight"}
    for name in stored.manifest():
        tensor = stored.read(name)
        weight = source.read(name).float()
        values = codec_named(tensor.codec_name).decode(tensor.planes, weight.shape[-1]).reshape(weight.shape)
        error = float(((torch.from_numpy(values) - weight) ** 2).sum() / (weight**2).sum())
        assert error < 0.35 if "proj" in name else error < 1e-3, name
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert (tmp_path / "out" / "model" / "tokenizer.json").is_file()


@pytest.mark.parametrize(("target", "most"), [("gguf:TQ1_0", 0.35), ("gguf:Q1_0", 0.5), ("gguf:NVFP4", 0.012)])
def test_small_types_are_solved_tuned_and_written(recipe: Recipe, target: str, most: float, tmp_path: Path) -> None:
    """Types of fewer than 4 bits are tuned, and NVFP4 is smoothed and has a scale for each matrix. The file holds the
    bits that were solved."""
    report = quantize(changed(recipe, target=target, tune=2), tmp_path / "out")
    stored, file = Artifact(tmp_path / "out"), GGUFModel(write(Artifact(tmp_path / "out"), tmp_path / "out.gguf")[0])
    codec_name = WITH_SCALE.get(target, target)
    solved = [tensor for tensor in report["tensors"] if tensor["codec"] == codec_name]
    assert len(solved) == 14
    for tensor in solved:
        assert tensor["weight_error"] < most
        planes = stored.read(tensor["name"]).planes
        assert np.array_equal(file.read(tensor["name"]), codec_named(codec_name).decode(planes, tensor["shape"][1]))


def test_methods_order_as_they_should(recipe: Recipe, tmp_path: Path) -> None:
    """On the calibration text itself, LeanQuant's loss is below GPTQ's."""
    losses = {}
    for method in ("gptq", "lean"):
        report = quantize(changed(recipe, target="gguf:Q2_K", method=method, tune=0), tmp_path / method)
        losses[method] = np.mean([t["relative_error"] for t in report["tensors"] if "relative_error" in t])
    assert losses["lean"] < 0.8 * losses["gptq"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefix": "quantized", "asymmetric": True},
        {"prefix": "quantized", "asymmetric": True, "moments": "guided"},
        {"moments": "guided", "output_groups": 2},
        {"target": "gguf:auto", "size": "7.5bpw", "moments": "guided"},
    ],
    ids=["full", "asymmetric", "asymmetric guided", "guided", "size"],
)
def test_interrupted_anywhere_resumes_to_the_same_bytes(
    recipe: Recipe, options: dict[str, object], smaller_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is stopped before various of the files that it writes."""
    recipe = changed(recipe, **{"source": str(smaller_model), "target": "gguf:Q4_1"} | options)
    monkeypatch.setattr(kept_states, "SECONDS", 0.0)
    replace, writes_left = Path.replace, [10_000]

    def until(self: Path, target: Path) -> Path:
        if writes_left[0] == 0:
            raise KeyboardInterrupt
        writes_left[0] -= 1
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", until)
    quantize(recipe, tmp_path / "whole")
    expected, writes = contents(tmp_path / "whole"), 10_000 - writes_left[0]
    for stop in sorted({*range(0, writes, writes // 5), writes - 1}):
        writes_left[0] = stop
        with pytest.raises(KeyboardInterrupt):
            quantize(recipe, tmp_path / str(stop))
        assert not Artifact(tmp_path / str(stop)).complete
        writes_left[0] = 10_000
        quantize(recipe, tmp_path / str(stop))
        assert contents(tmp_path / str(stop)) == expected


def test_a_run_that_was_stopped_as_it_measured_goes_on_with_another_cache(
    recipe: Recipe, smaller_model: Path, tmp_path: Path
) -> None:
    """Its guided pass would go on behind the last block, whose second moments the new cache does not have."""
    options = {"source": str(smaller_model), "target": "gguf:auto", "size": "7.5bpw", "moments": "guided", "tune": 0}

    def stop_in_the_second_block(stage: str, share: float) -> None:
        if stage == "Measuring types" and share > 0.5:
            raise KeyboardInterrupt

    recipe, out = changed(recipe, **options), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(recipe, out, cache=tmp_path / "first", listener=Callback(stop_in_the_second_block))
    quantize(recipe, out, cache=tmp_path / "second")
    assert Artifact(out).complete


@pytest.mark.parametrize("asymmetric", [False, True])
def test_a_resumed_run_begins_at_the_last_block_whose_inputs_are_kept(
    recipe: Recipe, asymmetric: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = changed(recipe, prefix="quantized", asymmetric=asymmetric, tune=0)
    quantize(recipe, tmp_path / "whole")
    monkeypatch.setattr(kept_states, "SECONDS", 0.0)
    run_blocks, first_group = [], "model.layers.1.self_attn.q_proj.weight"
    block, write = BlockModel.block, Artifact.write_behind

    def noted(self: BlockModel, index: int, *arguments: object) -> torch.nn.Module:
        run_blocks.append(index)
        return block(self, index, *arguments)

    def until_second_block(self: Artifact, tensor: StoredTensor) -> None:
        if tensor.name == first_group:
            raise KeyboardInterrupt
        write(self, tensor)

    monkeypatch.setattr(BlockModel, "block", noted)
    monkeypatch.setattr(Artifact, "write_behind", until_second_block)
    with pytest.raises(KeyboardInterrupt):
        quantize(recipe, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out" / "work" / "prefix").iterdir()} == {"1"}
    damaged = shutil.copytree(tmp_path / "out", tmp_path / "damaged") / "work" / "prefix" / "1" / "0.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    monkeypatch.setattr(Artifact, "write_behind", write)
    run_blocks.clear()
    quantize(recipe, tmp_path / "out")
    assert run_blocks == [1] * (1 + asymmetric)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    with pytest.raises(UserError, match=r"0\.safetensors is not as it was written"):
        quantize(recipe, tmp_path / "damaged")


def test_hidden_states_are_not_kept_on_a_disk_without_room(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_states, "SECONDS", 0.0)
    monkeypatch.setattr(kept_states.KeptStates, "write", None)
    monkeypatch.setattr(sequential.shutil, "disk_usage", lambda _: SimpleNamespace(free=4 * 6 * 64 * 256))
    quantize(changed(recipe, prefix="quantized", tune=0), tmp_path / "out")


def test_killed_outright_resumes_to_the_same_bytes(tiny_model: Path, text: Path, load_script, tmp_path: Path) -> None:
    kill = load_script("bench/kill.py")
    options = ["--target", "gguf:Q2_K", "--calibration", str(text)]
    options += ["--samples", "6", "--sequence-length", "64", "--tune", "5"]
    # A run imports packages for half of its time; this seed's kill comes after four fifths of it.
    result = kill.kill_and_resume(str(tiny_model), tmp_path, options, kills=1, seed=6)
    assert result["identical"]


def test_a_finished_artifact_is_left_alone(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = quantize(recipe, tmp_path / "out")
    monkeypatch.setattr(solve_model, "solve_linear", None)
    assert quantize(recipe, tmp_path / "out") == report


def test_the_prefixes_see_different_inputs(recipe: Recipe, tmp_path: Path) -> None:
    for prefix in ("full", "quantized"):
        quantize(changed(recipe, target="gguf:Q2_K", prefix=prefix, tune=0), tmp_path / prefix)
    first, second = (Artifact(tmp_path / prefix) for prefix in ("full", "quantized"))
    same = [name for name in first.manifest() if first.manifest()[name] == second.manifest()[name]]
    assert "model.layers.0.self_attn.q_proj.weight" in same  # nothing before it is quantized
    assert "model.layers.0.self_attn.o_proj.weight" not in same
    assert "model.layers.1.mlp.down_proj.weight" not in same


def damaged(tiny_model: Path, folder: Path, **tensors: torch.Tensor) -> Path:
    shutil.copytree(tiny_model, folder)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file({**state, **tensors}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_biases_are_kept(recipe: Recipe, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(recipe.source)
    config = type(model.config)(**{**model.config.to_dict(), "attention_bias": True})
    biased = type(model)(config)
    for name, parameter in biased.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    biased.save_pretrained(tmp_path / "biased")
    AutoTokenizer.from_pretrained(recipe.source).save_pretrained(tmp_path / "biased")
    quantize(changed(recipe, source=str(tmp_path / "biased"), tune=0), tmp_path / "out")
    stored = Artifact(tmp_path / "out").read("model.layers.0.self_attn.q_proj.bias")
    values = codec_named(stored.codec_name).decode(stored.planes, stored.shape[0]).ravel()
    expected = biased.state_dict()["model.layers.0.self_attn.q_proj.bias"].float().numpy()
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("prefix", ["full", "quantized"])
def test_shapes_that_no_block_holds_are_kept_in_half(recipe: Recipe, prefix: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512, hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "narrow")
    AutoTokenizer.from_pretrained(recipe.source).save_pretrained(tmp_path / "narrow")
    recipe = changed(recipe, source=str(tmp_path / "narrow"), target="gguf:Q4_K", prefix=prefix)
    quantize(recipe, tmp_path / "out")
    codecs = {name: entry["codec"] for name, entry in Artifact(tmp_path / "out").manifest().items()}
    assert codecs["model.layers.0.mlp.up_proj.weight"] == "gguf:F16"  # rows of 48
    assert codecs["model.layers.0.mlp.down_proj.weight"] == "gguf:Q5_0"  # rows of 96
    with pytest.raises(UserError, match="cannot hold 9 of 12 tensors"):
        quantize(changed(recipe, fallback=False), tmp_path / "refused")


def test_nan_weights_are_named(recipe: Recipe, tiny_model: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    bad = torch.zeros(512, 256, dtype=torch.float16)
    bad[3, 5] = torch.nan
    source = damaged(tiny_model, tmp_path / "nan", **{name: bad})
    with pytest.raises(UserError, match=r"layers.1.mlp.up_proj.weight has 1 NaN"):
        quantize(changed(recipe, source=str(source)), tmp_path / "out")


def test_a_truncated_checkpoint_is_refused(recipe: Recipe, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "cut")
    path = tmp_path / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="cut short or damaged"):
        quantize(changed(recipe, source=str(tmp_path / "cut")), tmp_path / "out")
    path.unlink()
    with pytest.raises(UserError, match=r"neither model.safetensors nor"):
        quantize(changed(recipe, source=str(tmp_path / "cut")), tmp_path / "out")


def test_sharded_checkpoints_give_the_same_weights(recipe: Recipe, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(recipe.source)
    model.save_pretrained(tmp_path / "shards", max_shard_size="500KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    one, many = open_source(recipe.source), open_source(str(tmp_path / "shards"))
    assert set(one.names()) == set(many.names())
    for name in one.names():
        torch.testing.assert_close(one.read(name).float(), many.read(name).float(), rtol=0, atol=0)
        assert one.shape(name) == many.shape(name)
    (tmp_path / "shards" / "model-00002-of-00006.safetensors").unlink(missing_ok=True)
    next(iter((tmp_path / "shards").glob("*.safetensors"))).unlink()
    with pytest.raises(UserError, match="is missing"):
        open_source(str(tmp_path / "shards"))


def test_another_runs_folder_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    """The dry run says the same, before it plans by the types that the other run has chosen."""
    quantize(changed(recipe, method="rtn"), tmp_path / "out")
    assert preview(changed(recipe, method="rtn"), tmp_path / "out").missing_bytes == 0
    for work in (quantize, preview):
        with pytest.raises(UserError, match=r"holds another run: recipe.target is '.*', not 'gguf:Q4_0'\. Choose"):
            work(changed(recipe, method="rtn", target="gguf:Q4_0"), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(UserError, match="not an lqexport artifact"):
        quantize(recipe, tmp_path / "mine")


def test_other_versions_are_another_run(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = changed(recipe, method="rtn")
    quantize(recipe, tmp_path / "out")
    assert Artifact(tmp_path / "out").run()["versions"]["numpy"] == np.__version__
    monkeypatch.setattr(output_folder, "versions", lambda *names: dict.fromkeys(names, "0"))
    with pytest.raises(UserError, match=r"holds another run: versions\.lqexport is '.*', not '0'"):
        quantize(recipe, tmp_path / "out")
    monkeypatch.undo()
    run = Artifact(tmp_path / "out").run()
    del run["recipe"]["mtp"]
    (tmp_path / "out" / "run.json").write_text(json.dumps(run))
    with pytest.raises(UserError, match=r"another run: recipe\.mtp was not known to it\. Go on with the versions that"):
        quantize(recipe, tmp_path / "out")


def test_a_stopped_run_does_not_go_on_with_other_tokens(
    recipe: Recipe, smaller_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer is edited meanwhile: text and number of tokens stay. A run.json of before has no digest of them."""

    def stopped(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lqexport.pipeline.quantize._run_stages", stopped)
    source, out = shutil.copytree(smaller_model, tmp_path / "model"), tmp_path / "out"
    recipe = changed(recipe, source=str(source))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            quantize(recipe, out)
    content = json.loads((source / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    (source / "tokenizer.json").write_text(json.dumps(content))
    sentence = r"holds another run: the calibration text gives other token ids, as with another tokenizer\. Choose"
    for work in (quantize, preview):
        with pytest.raises(UserError, match=sentence):
            work(recipe, out)
    run = Artifact(out).run()
    del run["calibration"]["tokens_sha256"]
    (out / "run.json").write_text(json.dumps(run))
    preview(recipe, out)
    with pytest.raises(KeyboardInterrupt):
        quantize(recipe, out)


def test_a_full_disk_leaves_nothing_half_written(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        quantize(changed(recipe, method="rtn"), tmp_path / "out")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_too_little_text_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    for work in (quantize, preview):
        with pytest.raises(UserError, match=r"short\.txt has \d+ tokens, and a sequence of 64 needs 64"):
            work(changed(recipe, calibration=str(tmp_path / "short.txt")), tmp_path / "out")


def test_a_dry_run_says_what_is_unusual_about_the_calibration(recipe: Recipe, tmp_path: Path) -> None:
    recipe = changed(recipe, target="gguf:Q4_0")
    assert preview(recipe, tmp_path / "out").warnings == ()
    few, long = changed(recipe, samples=100_000), changed(recipe, sequence_length=1024)
    assert preview(few, tmp_path / "out").warnings[-1].endswith("too short for 100000 different sequences.")
    assert preview(long, tmp_path / "out").warnings[0].startswith("The model was trained on 512 positions")
    # A text of the hub is not read.
    assert preview(changed(recipe, calibration="wikitext2"), tmp_path / "out").warnings == ()


def test_no_gpu_is_said(recipe: Recipe, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(UserError, match="no CUDA device"):
        quantize(recipe, tmp_path / "out", device="cuda")
