"""Blocks that predict further tokens (MTP): GGUF files keep them, and llama.cpp computes them as transformers would."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from family_cases import config_and_shapes, export, make_model, make_tokenizer
from family_cases import texts as texts
from further_blocks import Predicting, logits_in_llamacpp, predicting
from gguf import GGUFReader
from rewritten_files import rewritten

from lqexport.checking.checking import check_file
from lqexport.converters.gguf.reader import GGUFModel
from lqexport.converters.models.architecture import CUT
from lqexport.converters.models.further import block_count
from lqexport.converters.targets import plan
from lqexport.evaluation.llamacpp import LlamaCpp
from lqexport.models.column_order import source_like, source_of
from lqexport.models.inspect import inspect
from lqexport.models.source import HuggingFaceSource, open_source
from lqexport.models.written import open_export
from lqexport.planning.dryrun import preview
from lqexport.planning.forecast import ConfigModel
from lqexport.recipe import Recipe
from lqexport.solver.rounded_tensor import round_tensor
from lqexport.storage.artifact import decoded
from lqexport.target import Target
from lqexport.verification.comparison import compare
from lqexport.verification.verify_tensors import relative_error
from lqexport.verification.verifying import verify

CUT_FOR_DRAFTS = "glm4moe-lite"
"""A case in which `kv_b_proj` is cut in two in a file with the block, and is not in one without it."""
TOKENS = [1, 5, 6, 7, 9, 30, 31, 77]


@pytest.mark.llamacpp
@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    ["qwen3_5", "qwen3_5moe", "qwen3next", "glm4moe", "glm4moe-air", "glm4moe-lite", "glm-dsa", "deepseek-v3",
     "deepseek-v32", "mimo2", "nemotron-h-moe", "nemotron-h-latent"],
)  # fmt: skip
def test_llamacpp_computes_the_block_as_transformers_does(name: str, tmp_path: Path) -> None:
    made = predicting(name)
    source = str(made.save(tmp_path))
    path = export(tmp_path, Recipe(source, "gguf:F16"))
    logits, further = logits_in_llamacpp(path, TOKENS, made.model.config.hidden_size)
    assert np.abs(logits - made.model(torch.tensor([TOKENS])).logits[0].numpy()).mean() < 0.003
    assert np.abs(further - made.logits(TOKENS)).mean() < 0.003
    model = GGUFModel(path)
    assert (model.config["num_hidden_layers"], block_count(model.config)) == (made.layers, made.layers + made.count)
    file = open_export(path)
    against = source_like(open_source(source), file.config)
    of_file, of_source = (
        {name for name in each.names() if name.startswith(f"model.layers.{made.layers}.")} for each in (file, against)
    )
    assert of_file == of_source
    assert all(relative_error(file.read(name).numpy(), against.read(name)) < 1e-3 for name in of_file)


@pytest.mark.llamacpp
@pytest.mark.parametrize("name", ["qwen3_5", CUT_FOR_DRAFTS])
def test_the_model_is_the_same_without_the_block(name: str, tmp_path: Path) -> None:
    """Its logits are the same, bit for bit, if both files have the same tensors of it."""
    source, logits = str(predicting(name).save(tmp_path)), []
    for mtp in (True, False):
        path = export(tmp_path / str(mtp), Recipe(source, "gguf:F16", mtp=mtp))
        with LlamaCpp(path, 64, threads=1) as engine:
            logits.append(engine.logits(TOKENS))
    difference = np.abs(logits[1] - logits[0]).mean()
    assert difference < 0.003 if name == CUT_FOR_DRAFTS else difference == 0
    assert not any("nextn" in tensor.name for tensor in GGUFReader(path).tensors)


@pytest.mark.llamacpp
def test_a_block_with_an_embedding_and_an_output_of_its_own(tmp_path: Path) -> None:
    """Published models have both. They are copies of the model's own there, and others here."""
    made = Predicting("glm4moe", own_vocabulary=True)
    path = export(tmp_path, Recipe(str(made.save(tmp_path)), "gguf:F16"))
    _, further = logits_in_llamacpp(path, TOKENS, made.model.config.hidden_size)
    assert np.abs(further - made.logits(TOKENS)).mean() < 0.003


@pytest.mark.llamacpp
@pytest.mark.parametrize(("name", "target"), [("qwen3_5", "gguf:Q4_K_M"), ("glm4moe-lite", "gguf:Q4_0")])
def test_the_block_is_rounded_to_eight_bits(name: str, target: str, tmp_path: Path, texts: tuple[str, str]) -> None:
    made = Predicting(name)
    recipe = Recipe(str(made.save(tmp_path)), target, calibration=texts[0], samples=2, sequence_length=64, descent=0)
    source, path = source_of(recipe), export(tmp_path, recipe)
    file, prefix = open_export(path), f"model.layers.{made.layers}."
    matrices = [entry for entry in inspect(path).entries if entry.name.startswith(prefix) and len(entry.shape) == 2]
    assert {entry.type for entry in matrices if not entry.name.endswith("mlp.gate.weight")} == {"gguf:Q8_0"}
    assert {f"{prefix}eh_proj.weight", f"{prefix}self_attn.o_proj.weight"} <= {entry.name for entry in matrices}
    for entry in matrices:
        rounded = round_tensor(entry.name, source.read(entry.name), entry.type)
        assert (file.read(entry.name).numpy() == decoded(rounded)).all()
    assert [problem.sentence for problem in check_file(path).problems] == []
    result = verify(path, source.name, text=texts[1], windows=1)
    (compared,) = compare([path], source.name, text=texts[1], windows=1).files
    assert compared.evaluation.kl == pytest.approx(result.evaluations[0].kl, rel=1e-3)
    assert (result.failed, [line for line in result.warnings if "architecture" in line]) == ([], [])
    assert f"{prefix}eh_proj.weight" in {tensor.name for tensor in result.tensors}
    again = export(tmp_path / "again", Recipe(str(path), "gguf:Q5_0", method="rtn"))
    for entry in matrices:
        assert relative_error(open_export(again).read(entry.name).numpy(), file.read(entry.name)) < 1e-5


def test_a_block_that_lacks_a_tensor_is_left_out(tmp_path: Path) -> None:
    made = Predicting("qwen3_5")
    folder = made.save(tmp_path)
    for name, kept in (("mtp.fc.weight", 0), ("mtp.layers.0.mlp.up_proj.weight", 0), (None, 15)):
        path = folder / "model.safetensors"
        stored = safetensors.torch.load_file(path)
        removed = stored.pop(name) if name else None
        safetensors.torch.save_file(stored, path)
        source = HuggingFaceSource(folder, "")
        shapes = {name: source.shape(name) for name in source.names()}
        planned = plan(Target.parse("gguf:Q4_0"), source.config, shapes)
        assert sum("layers.2." in tensor.name for tensor in planned) == kept
        if name and removed is not None:
            safetensors.torch.save_file(stored | {name: removed}, path)


def test_targets_that_do_not_run_the_block_leave_it_out() -> None:
    config, shapes = config_and_shapes("glm4moe")
    further = {name: tuple(tensor.shape) for name, tensor in Predicting("glm4moe").names().items()}
    target = Target.parse("native:table-4")
    assert plan(target, config, shapes | further) == plan(target, config, shapes)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("qwen3_5", "mtp_num_hidden_layers"),
        ("glm4moe", "num_nextn_predict_layers"),
        ("nemotron-h-moe", "num_nextn_predict_layers"),
        ("nemotron-h-latent", "num_nextn_predict_layers"),
        ("mimo2", "num_nextn_predict_layers"),
    ],
)
def test_a_plan_by_config_json_counts_the_block(name: str, key: str) -> None:
    config, shapes = config_and_shapes(name)
    model = ConfigModel(config | {key: 1})
    further = {name: model.shape(name) for name in set(model.names()) - shapes.keys()}
    made = predicting(name)
    expected = {f"model.layers.{made.layers}.{end}": shape for end, shape in made.shapes().items()}
    expected = {name: shape for name, shape in expected.items() if not name.endswith(".bias")}
    assert {name: shape for name, shape in further.items() if ".experts." not in name} == {
        name: shape for name, shape in expected.items() if ".experts." not in name
    }


def test_blocks_that_are_left_out_are_said(tmp_path: Path) -> None:
    """Not said where they are kept, or left out on request."""
    made = Predicting("qwen3_5")
    folder = made.save(tmp_path)
    kept, asked = (preview(Recipe(str(folder), "gguf:Q4_0", mtp=mtp), tmp_path / "out") for mtp in (True, False))
    assert kept.warnings == asked.warnings
    assert {tensor.name for tensor in kept.tensors} - {tensor.name for tensor in asked.tensors} == {
        f"model.layers.2.{end}" for end in made.block | made.beside
    }
    path = folder / "model.safetensors"
    stored = safetensors.torch.load_file(path)
    del stored["mtp.fc.weight"]
    safetensors.torch.save_file(stored, path)
    (said,) = set(preview(Recipe(str(folder), "gguf:Q4_0"), tmp_path / "out").warnings) - set(kept.warnings)
    assert said.startswith("Blocks that predict further tokens are left out, since some of their tensors are missing: ")
    model = make_model("llama")
    model.save_pretrained(tmp_path / "llama")
    make_tokenizer("gpt-2", tmp_path).save_pretrained(tmp_path / "llama")
    path = tmp_path / "llama" / "model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(path) | {"model.mtp.fc.weight": torch.zeros(4, 4)}, path)
    (said,) = preview(Recipe(str(tmp_path / "llama"), "gguf:Q4_0"), tmp_path / "out").warnings
    assert said.endswith("since GGUF files of LlamaForCausalLM are written without them: model.mtp.fc.weight.")


def test_files_of_others_with_kv_b_proj_cut_in_two_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    make_model("deepseek-v2-lite").save_pretrained(folder)
    make_tokenizer("smaug-bpe", tmp_path).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {CUT: True}))
    source = HuggingFaceSource(folder, "")
    path = export(tmp_path, Recipe(str(folder), "gguf:F16"))
    file = GGUFModel(path)
    assert (file.config[CUT], file.config["architectures"]) == (True, ["DeepseekV2ForCausalLM"])
    assert set(file.names()) == set(source.names())
    assert all(relative_error(file.read(name), source.read(name)) < 1e-6 for name in file.names())
    again = export(tmp_path / "again", Recipe(str(path), "gguf:Q4_0", method="rtn"))
    assert GGUFModel(again).config == file.config


def test_a_file_cut_in_two_is_compared_with_a_whole_one(tmp_path: Path) -> None:
    """Either can be the source, and one matrix that is another fails."""
    folder, files = tmp_path / "hf", {}
    make_model("deepseek-v3").save_pretrained(folder)
    make_tokenizer("deepseek-v3", tmp_path).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for is_cut in (False, True):
        (folder / "config.json").write_text(json.dumps(config | ({CUT: True} if is_cut else {})))
        files[is_cut] = export(tmp_path / str(is_cut), Recipe(str(folder), "gguf:F16"))
    name = "blk.1.attn_v_b.weight"
    wrong = rewritten(files[True], tmp_path / "wrong.gguf", lambda content: content.tensors[name][:].sort(axis=1))
    for path, against in ((files[True], files[False]), (files[False], files[True]), (files[False], wrong)):
        file, source = open_export(path), source_like(open_source(str(against)), open_export(path).config)
        assert set(source.names()) == set(file.names())
        assert {name: source.shape(name) for name in source.names()} == {
            each: file.shape(each) for each in file.names()
        }
        different = [each for each in file.names() if not torch.equal(source.read(each).float(), file.read(each))]
        assert different == (["model.layers.1.self_attn.kv_b_proj.weight"] if against == wrong else [])
        if against != files[True]:
            result = verify(path, str(against), windows=1)
            assert bool(result.failed) is (against == wrong), result.failed
