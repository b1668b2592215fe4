"""EXL3 folders: plans, what a folder holds, what is read back, and what ExLlamaV3 would load and compute wrongly."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import exllamav3_on_cpu
import numpy as np
import pytest
import safetensors.numpy
import torch
from random_exl3 import random_artifact
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, Phi3Config
from typer.testing import CliRunner

from lqexport.cli.app import app
from lqexport.converters.exl3 import writer
from lqexport.converters.exl3.plan import padded_weights, plan_exl3
from lqexport.converters.exl3.support import check_supported, warnings_of
from lqexport.converters.models.architectures import architecture_of, normalized
from lqexport.converters.plan import PlannedTensor
from lqexport.errors import UserError
from lqexport.formats.exl3 import EXL3, MARKERS
from lqexport.formats.trellis import padded
from lqexport.models.blocks import BlockModel
from lqexport.models.inspect import inspect
from lqexport.models.modules import expected_shapes
from lqexport.models.source import open_source
from lqexport.models.written import open_export
from lqexport.pipeline.exl3_bits import DISTORTION, chosen_widths, width_losses
from lqexport.planning.dryrun import preview
from lqexport.planning.needs import engine_warnings
from lqexport.recipe import Recipe
from lqexport.storage.artifact import Artifact, decoded
from lqexport.target import Target
from lqexport.verification.verifying import verify

GATE = "model.layers.1.mlp.gate_proj"
Q_PROJ = "model.layers.0.self_attn.q_proj"
SIZES = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
SIZES |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}


@pytest.fixture(scope="module")
def source(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with biases, whose keys, values and MLP have to be padded."""
    folder = tmp_path_factory.mktemp("exl3") / "source"
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=True)
    LlamaForCausalLM(config).half().save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    biases = {name: np.random.default_rng(1).normal(0, 0.1, plane.shape).astype(np.float16)
              for name, plane in stored.items() if name.endswith("bias")}  # fmt: skip
    safetensors.numpy.save_file(stored | biases, folder / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, folder)
    return folder


@pytest.fixture(scope="module")
def recipe(source: Path) -> Recipe:
    return Recipe(str(source), "exl3", bits=2.75, head_bits=5)


@pytest.fixture(scope="module")
def artifact(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return random_artifact(recipe, tmp_path_factory.mktemp("exl3") / "artifact")


@pytest.fixture(scope="module")
def folder(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exl3") / "model"
    writer.write(artifact, path)
    return path


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


# Plans.


def planned(config: dict, target: str = "exl3", bits: float | None = None, head_bits: int = 6) -> list[PlannedTensor]:
    return plan_exl3(Target.parse(target), config, expected_shapes(config), bits=bits, head_bits=head_bits)


def widths(tensors: list[PlannedTensor]) -> dict[str, float]:
    return {tensor.name: EXL3[tensor.codec_name].trellis.halves / 2 for tensor in tensors if tensor.linear}


def llama(**options: object) -> dict:
    return LlamaConfig(**SIZES | options, architectures=["LlamaForCausalLM"]).to_dict()


@pytest.mark.parametrize("bits", [1, 2.75, 3.25, 4.4, 8])
def test_even_widths_take_the_bits_that_were_asked_for(bits: float) -> None:
    tensors = planned(llama(), bits=bits)
    shapes = {tensor.name: tensor.shape for tensor in tensors if tensor.name != "lm_head.weight"}
    chosen = {name: width for name, width in widths(tensors).items() if name in shapes}
    weights = sum(padded_weights(shapes[name]) for name in chosen)
    spent = sum(width * padded_weights(shapes[name]) for name, width in chosen.items()) / weights
    assert bits - 0.2 < spent <= bits
    assert max(chosen.values()) - min(chosen.values()) <= 1


def test_one_width_for_all_and_another_for_the_output() -> None:
    tensors = planned(llama(), "exl3:2.5", head_bits=4)
    chosen = widths(tensors)
    assert chosen.pop("lm_head.weight") == 4
    assert set(chosen.values()) == {2.5}
    assert {tensor.codec_name for tensor in tensors if not tensor.linear} == {"gguf:F16"}
    tied = llama(tie_word_embeddings=True)
    assert planned(tied)[-1].codec_name == "exl3:6"
    assert planned(tied, head_bits=16)[-1].name == "model.norm.weight"  # ExLlamaV3 then takes the embedding


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "exl3:4.5"}, "Unknown target 'exl3:4.5'"),
        ({"bits": 8.5}, "from 1 to 8 bits per weight, not 8.5"),
        ({"bits": 0.5}, "from 1 to 8 bits per weight, not 0.5"),
        ({"target": "exl3:4", "head_bits": 9}, "not 9"),
    ],
)
def test_bits_that_do_not_exist_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        planned(llama(), **arguments)


def test_experts_of_a_block_have_one_width_for_each_projection() -> None:
    mixtral = MixtralConfig(**SIZES, num_local_experts=4, architectures=["MixtralForCausalLM"]).to_dict()
    for bits in np.linspace(2, 3, 9):
        chosen = widths(planned(mixtral, bits=bits))
        for layer in (0, 1):
            for module in ("gate_proj", "up_proj", "down_proj"):
                names = [f"model.layers.{layer}.mlp.experts.{expert}.{module}.weight" for expert in range(4)]
                assert len({chosen[name] for name in names}) == 1


def test_fused_linears_are_split_where_rows_are_rotated_together() -> None:
    sizes = SIZES | {"num_key_value_heads": 4, "intermediate_size": 256}
    phi = Phi3Config(**sizes, architectures=["Phi3ForCausalLM"]).to_dict()
    assert "model.layers.0.mlp.gate_up_proj.weight" in widths(planned(phi, "exl3:2"))
    with pytest.raises(UserError, match=r"splits model\.layers\.0\.mlp\.gate_up_proj\.weight at the rows 160"):
        planned(phi | {"intermediate_size": 160}, "exl3:2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]}, "does not run it, or not as transformers"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "no rope scaling of type 'longrope'"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}},
            "computes yarn with the factor .*, 16, and config.json has 8",
        ),
        ({"intermediate_size": 55297}, "more than 55296 columns"),
        (
            {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64},
            "without sliding windows, and by config.json each has 64 of 512",
        ),
    ],
)
def test_what_exllamav3_does_not_compute_as_transformers_is_refused(options: dict, message: str) -> None:
    config = normalized(llama() | options)
    with pytest.raises(UserError, match=message):
        check_supported(architecture_of(config), config)


def test_what_exllamav3_does_otherwise_is_said_before_work(recipe: Recipe, smaller_model: Path) -> None:
    assert engine_warnings(open_source(recipe.source), recipe) == []
    (sentence,) = engine_warnings(open_source(str(smaller_model)), recipe)
    assert "hidden_size is no multiple of 128" in sentence
    olmo = normalized(llama(sliding_window=64) | {"model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"]})
    rope = {"rope_type": "default", "rope_theta": 1e4}
    olmo["rope_parameters"] = {"full_attention": rope, "sliding_attention": rope}
    (sentence,) = warnings_of(architecture_of(olmo), olmo)
    assert "windows of 65 tokens, and transformers of 64" in sentence


@pytest.mark.parametrize(("target", "engine"), [("exl2", "ExLlamaV2"), ("exl3", "ExLlamaV3")])
def test_a_missing_tokenizer_json_is_said_before_work(
    target: str, engine: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    recipe = Recipe(str(folder), target, bits=4.5, method="rtn")
    assert preview(recipe, tmp_path / "out").warnings == ()
    (folder / "tokenizer.json").unlink()
    (sentence,) = preview(recipe, tmp_path / "out").warnings
    assert sentence.startswith(f"{engine} needs a tokenizer.json, and {folder} has none.")


def test_options_that_do_not_belong_together_are_refused() -> None:
    for options in ({"target": "exl3"}, {"target": "exl3:4", "bits": 4.0}):
        with pytest.raises(UserError, match="needs --bits"):
            Recipe("x", **options)
    for options, message in (
        ({"output_type": "Q6_K"}, "head-bits"),
        ({"rank": 8}, "leave out rank"),
        ({"moments": "guided", "output_groups": 2}, "one output group"),
    ):
        with pytest.raises(UserError, match=message):
            Recipe("x", "exl3:4", **options)


# Choices.


@pytest.fixture(scope="module")
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    inputs = torch.randn(512, 128) * torch.linspace(-3, 1, 128).exp()
    return torch.randn(96, 128) * torch.rand(96, 1), inputs.T @ inputs / 512


def test_a_bit_more_costs_about_a_quarter(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    settings = Recipe("x", "exl3:4").solver_settings
    losses = list(width_losses(*problem, settings, guided=False).values())
    assert sorted(losses, reverse=True) == losses
    assert losses[6] / losses[4] == pytest.approx(0.256, rel=0.05)  # 4 and 3 bits
    assert 0 < losses[0] < 0.3
    doubled = width_losses(2 * problem[0], problem[1], settings, guided=True)
    assert list(doubled.values())[4] == pytest.approx(
        4 * list(width_losses(*problem, settings, guided=True).values())[4], rel=1e-4
    )


def test_widths_go_where_they_save_most() -> None:
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (128, 256) for i in range(4)}
    shapes |= {f"model.layers.0.mlp.experts.{i}.up_proj.weight": (100, 128) for i in range(3)}
    scales = dict(zip(shapes, (1.0, 10.0, 100.0, 1000.0, 1.0, 5.0, 30.0), strict=True))
    names = dict(zip(DISTORTION, [name for name in EXL3 if "-" not in name], strict=True))
    losses = {name: {names[k]: scale * error for k, error in DISTORTION.items()} for name, scale in scales.items()}
    found = chosen_widths(losses, shapes, 3.25)
    chosen = {name: EXL3[option.name].trellis.halves / 2 for name, option in found.chosen.items()}
    assert list(chosen) == list(shapes)
    spent = sum(width * padded_weights(shapes[name]) for name, width in chosen.items())
    assert 3.0 < spent / sum(map(padded_weights, shapes.values())) <= 3.25
    ups = list(chosen.values())[:4]
    assert sorted(ups) == ups
    assert ups[3] - ups[0] >= 2
    assert len(set(list(chosen.values())[4:])) == 1  # experts together
    assert found.loss < sum(scale * DISTORTION[3.5] for scale in scales.values())


# The folder.


def test_the_folder_is_what_exllamav3_loads(folder: Path, artifact: Artifact) -> None:
    stored = load_file(folder / "model.safetensors")
    manifest = artifact.manifest()
    assert f"{GATE}.weight" not in stored
    for name, facts in manifest.items():
        if facts["codec"] in EXL3:
            key, (rows, columns) = name.removesuffix(".weight"), map(padded, facts["shape"])
            words = EXL3[facts["codec"]].trellis.words
            assert stored[f"{key}.trellis"].shape == (columns // 16, rows // 16, words)
            assert (stored[f"{key}.suh"].shape, stored[f"{key}.svh"].shape) == ((columns,), (rows,))
            assert not stored[f"{key}.svh"][facts["shape"][0] :].any()
            assert int(stored[f"{key}.mul1"].view(np.uint32)) == MARKERS["mul1"]
    assert {plane.dtype.name for plane in stored.values()} == {"int16", "int32", "float16"}
    assert stored["model.layers.0.self_attn.k_proj.bias"].shape == (128,)  # 64, padded as its linear
    assert "lm_head.trellis" in stored  # although the source's output shares the embedding's weights


def test_the_settings_are_there_for_every_reader(folder: Path, artifact: Artifact) -> None:
    config = json.loads((folder / "config.json").read_text())
    stated = config["quantization_config"]
    assert config["tie_word_embeddings"] is False
    assert config["rope_theta"] == 1e4
    assert stated["bits"] == pytest.approx(2.75, abs=0.1)
    assert (stated["quant_method"], stated["head_bits"], stated["codebook"]) == ("exl3", 5, "mul1")
    theirs = json.loads((folder / "quantization_config.json").read_text())
    gate = theirs["tensor_storage"][GATE]
    trellis = gate["stored_tensors"][f"{GATE}.trellis"]
    assert (trellis["dtype"], trellis["torch_dtype"]) == ("torch.int16", "int16")
    assert trellis["n_bytes"] == 2 * math.prod(trellis["shape"])
    assert gate["bits_per_weight"] == EXL3[artifact.manifest()[f"{GATE}.weight"]["codec"]].trellis.halves / 2
    assert gate["mul1_multiplier"] == MARKERS["mul1"]
    assert set(theirs["tensor_storage"]["model.norm"]) == {"stored_tensors"}
    gptqmodel = json.loads((folder / "quantize_config.json").read_text())
    assert "version" not in gptqmodel  # which GPTQModel takes for the name of a format
    assert "model.norm" not in gptqmodel["tensor_storage"]


def test_what_is_read_is_what_was_written(folder: Path, artifact: Artifact) -> None:
    model = open_export(folder)
    assert set(model.names()) == set(artifact.manifest())
    for name, facts in artifact.manifest().items():
        tensor = artifact.read(name)
        assert model.shape(name) == tuple(facts["shape"])
        assert np.array_equal(model.read(name).numpy(), decoded(tensor)), name
        codec_name, planes, _ = model.planes(name)
        assert codec_name == facts["codec"]
        assert all(np.array_equal(planes[plane], array) for plane, array in tensor.planes.items())
    entries = {entry.name: entry for entry in inspect(folder).entries}
    assert entries[f"{GATE}.weight"].type == artifact.manifest()[f"{GATE}.weight"]["codec"]


def test_verify_reads_every_tensor_and_the_predictions(
    folder: Path, artifact: Artifact, source: Path, text: Path
) -> None:
    arguments = {"text": str(text), "windows": 1, "artifact": artifact.folder, "max_over_expected": None}
    result = verify(folder, str(source), **arguments)
    assert result.failed == []
    assert all(tensor.same_bytes for tensor in result.tensors)
    assert not [warning for warning in result.warnings if "architecture" in warning]


def test_split_linears_are_joined_again(tiny_model: Path, tmp_path: Path) -> None:
    sizes = SIZES | {"num_key_value_heads": 4, "intermediate_size": 256, "num_hidden_layers": 1}
    config = Phi3Config(**sizes, architectures=["Phi3ForCausalLM"])
    from transformers import Phi3ForCausalLM

    Phi3ForCausalLM(config).half().save_pretrained(tmp_path / "source")
    shutil.copy(tiny_model / "tokenizer.json", tmp_path / "source")
    artifact = random_artifact(Recipe(str(tmp_path / "source"), "exl3:2"), tmp_path / "artifact")
    writer.write(artifact, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    parts = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    assert [stored[f"{part}.svh"].shape for part in parts] == [(128,)] * 3
    name = "model.layers.0.self_attn.qkv_proj.weight"
    model = open_export(tmp_path / "model")
    assert np.array_equal(model.read(name).numpy(), decoded(artifact.read(name)))
    stored[f"{parts[1]}.suh"] = -stored[f"{parts[1]}.suh"]
    safetensors.numpy.save_file(stored, tmp_path / "model" / "model.safetensors")
    with pytest.raises(UserError, match="other suh"):
        open_export(tmp_path / "model").read(name)


def test_the_command(artifact: Artifact, folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["to-exl3", str(artifact.folder), str(tmp_path / "model")])
    assert result.exit_code == 0, result.output
    assert "verify" in result.stdout
    written = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert written == (folder / "model.safetensors").read_bytes()
    (copy := Artifact(Path(shutil.copytree(artifact.folder, tmp_path / "copy")))).model_folder.joinpath(
        "tokenizer.json"
    ).unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        writer.write(copy, tmp_path / "other")


def test_biases_of_routers_keep_float32() -> None:
    config = llama() | {"architectures": ["Dots1ForCausalLM"], "model_type": "dots1", "n_routed_experts": 4}
    config |= {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
    }
    codecs = {tensor.name.rpartition(".")[2]: tensor.codec_name for tensor in planned(config)}
    assert codecs["e_score_correction_bias"] == "gguf:F32"


# ExLlamaV3 itself.


@pytest.mark.skipif(not exllamav3_on_cpu.is_installed(), reason="exllamav3, marisa_trie or llguidance is not installed")
def test_exllamav3_computes_what_this_program_does(folder: Path) -> None:
    """ExLlamaV3's own loader and modules, with functions of torch in the place of its kernels."""
    tokens = list(range(40))
    with torch.no_grad():
        theirs = exllamav3_on_cpu.logits(exllamav3_on_cpu.load(folder), tokens)
        model = BlockModel(open_export(folder))
        state = model.start(torch.tensor([tokens]))
        for _, block in model.blocks():
            state = model.run(block, state)
        ours = model.logits(state)[0]
    assert (theirs[:, : ours.shape[1]] - ours).abs().max() < 0.03 * ours.std()


# Folders that ExLlamaV3's loader accepts, and that it then computes wrongly.

MIXED = "model.layers.0.mlp.experts.1.up_proj"
Planes = dict[str, np.ndarray]


def short(name: str) -> Callable[[Planes], Planes]:
    return lambda stored: stored | {name: stored[name][:-1]}


def without(name: str) -> Callable[[Planes], Planes]:
    return lambda stored: {key: plane for key, plane in stored.items() if key != name}


def wide(key: str, words: int) -> Callable[[Planes], Planes]:
    def widened(stored: Planes) -> Planes:
        tiles = stored[f"{key}.trellis"].shape[:2]
        return stored | {f"{key}.trellis": np.zeros((*tiles, words), np.int16)}

    return widened


def marked(key: str, marker: str, value: object) -> Callable[[Planes], Planes]:
    return lambda stored: stored | {f"{key}.{marker}": np.array(value)}


def noisy(stored: Planes) -> Planes:
    return stored | {f"{GATE}.svh": np.ones_like(stored[f"{GATE}.svh"])}


HOSTILE: dict[str, tuple[Callable[[Planes], Planes], str]] = {
    "tiles": (lambda stored: stored | {f"{GATE}.trellis": stored[f"{GATE}.trellis"][:-8]}, r"is I16 \[0, 16"),
    "output tiles": (lambda stored: stored | {f"{GATE}.trellis": stored[f"{GATE}.trellis"][:, :8]}, r"I16 \[8, 8"),
    "two dimensions": (lambda stored: stored | {f"{GATE}.trellis": stored[f"{GATE}.trellis"][0]}, "Its trellis is"),
    "dtype": (
        lambda stored: stored | {f"{GATE}.trellis": stored[f"{GATE}.trellis"].astype(np.int32)},
        "Its trellis is I32",
    ),
    "9 bits": (wide(GATE, 144), "9 bits with the codebook mul1, which do not exist"),
    "4.5 bits": (wide(GATE, 72), "4.5 bits with the codebook mul1"),
    "half bits of another codebook": (
        lambda stored: wide(GATE, 40)(without(f"{GATE}.mul1")(stored)),
        "2.5 bits with the codebook 3inst",
    ),
    "short suh": (short(f"{GATE}.suh"), r"Its suh is F16 \[127\], not F16 \[128\]"),
    "short svh": (short(f"{GATE}.svh"), r"Its svh is F16 \[255\], not F16 \[256\]"),
    "float32": (
        lambda stored: stored | {f"{GATE}.suh": stored[f"{GATE}.suh"].astype(np.float32)},
        "Its suh is F32",
    ),
    "no svh": (without(f"{GATE}.svh"), "It has no svh"),
    "svh and sv": (marked(GATE, "sv", np.zeros(16, np.int16)), "It has svh and sv"),
    "padding": (noisy, "not zero beyond its 160 outputs"),
    "two codebooks": (marked(GATE, "mcg", np.int32(-877912083)), "two codebooks, mul1 and mcg"),
    "another number": (marked(GATE, "mul1", np.int32(7)), "mul1 holds 0x7, not 0x83dcd12d"),
    "marker of zero": (marked(GATE, "mul1", np.zeros(1, np.int32)), "mul1 holds 0x0"),
    "marker of 64 bits": (marked(GATE, "mul1", np.int64(0)), "mul1 is I64"),
    "float16 too": (marked(GATE, "weight", np.zeros((160, 128), np.float16)), "holds .*gate_proj twice"),
    "output not padded": (
        lambda stored: stored | {"lm_head.trellis": stored["lm_head.trellis"][:, :-1]},
        r"lm_head.* Its trellis is I16 \[8, 31",
    ),
    "a bias of no linear": (marked(GATE, "bias", np.ones(256, np.float16)), "no such bias; ExLlamaV3 would add it"),
    "a short bias": (short(f"{Q_PROJ}.bias"), r"q_proj.bias has \[127\] numbers"),
    "infinite": (
        lambda stored: stored | {f"{GATE}.suh": np.full(128, np.inf, np.float16)},
        "infinite or not a number",
    ),
}


def read_all(folder: Path) -> None:
    model = open_export(folder)
    for name in model.names():
        model.shape(name)
        model.read(name)


@pytest.mark.parametrize("name", HOSTILE)
def test_what_exllamav3_would_compute_wrongly_is_refused(name: str, copied: Path) -> None:
    change, message = HOSTILE[name]
    path = copied / "model.safetensors"
    safetensors.numpy.save_file(
        {key: np.ascontiguousarray(plane).reshape(plane.shape) for key, plane in change(load_file(path)).items()}, path
    )
    with pytest.raises(UserError, match=message):
        read_all(copied)


def test_older_files_and_other_codebooks_are_read(copied: Path, folder: Path) -> None:
    path, stored = copied / "model.safetensors", load_file(copied / "model.safetensors")
    wide_layer = next(key for key in (GATE, Q_PROJ) if stored[f"{key}.trellis"].shape[2] % 16 == 0)
    key, rows = wide_layer, {GATE: 160, Q_PROJ: 128}[wide_layer]
    signs = np.zeros(padded(rows) // 16, np.int16)
    del stored[f"{key}.mul1"], stored[f"{key}.suh"]
    stored |= {f"{key}.su": np.full(8, -1, np.int16), f"{key}.mcg": np.array(MARKERS["mcg"], np.uint32).view(np.int32)}
    assert signs.size
    safetensors.numpy.save_file(stored, path)
    codec_name, planes, _ = open_export(copied).planes(f"{key}.weight")
    assert codec_name.endswith("-mcg")
    assert np.array_equal(planes["suh"], -np.ones(128, np.float16))


def test_experts_of_several_widths_are_refused(
    tiny_model: Path, tmp_path: Path, load_script: Callable[[str], ModuleType]
) -> None:
    from transformers import MixtralForCausalLM

    config = MixtralConfig(**SIZES | {"num_hidden_layers": 1}, num_local_experts=2)
    MixtralForCausalLM(config).half().save_pretrained(tmp_path / "source")
    shutil.copy(tiny_model / "tokenizer.json", tmp_path / "source")
    artifact = random_artifact(Recipe(str(tmp_path / "source"), "exl3:2"), tmp_path / "artifact")
    writer.write(artifact, tmp_path / "model")
    assert open_export(tmp_path / "model").read("model.layers.0.mlp.experts.1.up_proj.weight").shape == (160, 128)
    path = tmp_path / "model" / "model.safetensors"
    stored = load_file(path)
    key = "model.layers.0.block_sparse_moe.experts.1.w3"
    safetensors.numpy.save_file(wide(key, 48)(stored), path)
    with pytest.raises(UserError, match=r"in exl3:3 and .* in exl3:2, and ExLlamaV3 runs the experts"):
        open_export(tmp_path / "model")


def test_artifacts_of_other_formats_are_refused(artifact: Artifact, tmp_path: Path) -> None:
    from lqexport.converters.exl2 import writer as exl2_writer

    with pytest.raises(UserError, match="cannot become an EXL2 folder"):
        exl2_writer.write(artifact, tmp_path / "model")
    copy = Artifact(Path(shutil.copytree(artifact.folder, tmp_path / "copy")))
    tensor = copy.read(f"{GATE}.weight")
    copy.write(replace(tensor, planes=tensor.planes | {"suh": -tensor.planes["suh"]}))
    with pytest.raises(UserError, match="damaged"):
        writer.write(copy, tmp_path / "other")
    (copy.model_folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"ExLlamaV3 needs a tokenizer\.json"):
        writer.write(copy, tmp_path / "other")
    assert not (tmp_path / "other").exists()
