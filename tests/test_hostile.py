"""Hostile and damaged inputs: each is refused with one sentence.

Nothing outside the input's folder is read, little memory is taken, and no code in it runs. bench/fuzz.py tries many
more inputs; a sample of them runs here.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lqexport.converters.folders.native_read import NativeModel
from lqexport.converters.folders.peft import PeftAdapter
from lqexport.converters.gguf.header import read_header
from lqexport.converters.gguf.sentencepiece_model import read_sentencepiece
from lqexport.errors import LONGEST, UserError, printable
from lqexport.models.adapters import misfits
from lqexport.models.blocks import BlockModel
from lqexport.models.modules import meta_model
from lqexport.models.source import open_source
from lqexport.models.tokenizer_files import load_tokenizer
from lqexport.models.written import open_export
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe, load_recipe
from lqexport.storage.artifact import Artifact, manifest_bytes
from lqexport.storage.config_check import check_config
from lqexport.storage.files import read_json
from lqexport.storage.tensor_files import open_tensors

CASES = 8
"""How many damaged inputs are tried for each subject of bench/fuzz.py."""
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def fuzz(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("bench/fuzz.py")


@pytest.fixture(scope="module")
def sound(fuzz: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sound files of every subject."""
    folder = tmp_path_factory.mktemp("fuzz") / "sound"
    fuzz.make(folder)
    return folder


@pytest.fixture
def model(sound: Path, tmp_path: Path) -> Path:
    """A checkpoint in shards, to be damaged."""
    shutil.copytree(sound / "model", tmp_path / "model")
    return tmp_path / "model"


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_damage_of_every_kind_is_read_or_refused(fuzz: ModuleType, sound: Path, tmp_path: Path) -> None:
    refused = 0
    for name, subject in fuzz.subjects(sound).items():
        subject.read(subject.path)  # a sound input is not refused
        tally = fuzz.fuzz(name, subject, 0, 1, tmp_path / "scratch", CASES)
        assert tally.faults == {}
        refused += tally.refused
    assert refused > 0


@pytest.mark.parametrize("file", ["../model/model.safetensors", "/etc/passwd", "..", "sub/x.safetensors", 5, None, []])
def test_an_index_names_files_beside_it(model: Path, file: object) -> None:
    change_json(model / INDEX, weight_map={"model.norm.weight": file})
    with pytest.raises(UserError, match=r"another folder|another form"):
        open_source(str(model))


def test_an_index_that_is_wrong_about_a_shard(model: Path) -> None:
    shards = json.loads((model / INDEX).read_text())["weight_map"]
    change_json(model / INDEX, weight_map=shards | {"model.layers.7.x.weight": shards["model.norm.weight"]})
    with pytest.raises(UserError, match=r"has no tensor model\.layers\.7\.x\.weight"):
        open_source(str(model))


def test_two_models_in_one_folder(model: Path) -> None:
    shard = next(model.glob("*-of-*.safetensors"))
    shutil.copy(shard, model / "model.safetensors")
    with pytest.raises(UserError, match=r"holds two models: model\.safetensors, which transformers reads, and"):
        open_source(str(model))


def test_small_files_are_not_copied_from_elsewhere(model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text('{"token": "secret"}')
    (model / "generation_config.json").unlink(missing_ok=True)
    (model / "generation_config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(UserError, match=r"generation_config\.json leads out of"):
        quantize(Recipe(str(model), "gguf:F16"), tmp_path / "out")


def test_the_links_of_the_hubs_cache_are_followed(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--x"
    snapshot = cache / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    shutil.move(model, cache / "blobs")
    for path in (cache / "blobs").iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    quantize(Recipe(str(snapshot), "gguf:F16"), tmp_path / "out")
    copied = tmp_path / "out" / "model" / "tokenizer.json"
    assert copied.read_bytes() == (cache / "blobs" / "tokenizer.json").read_bytes()


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (Path(self.marker),)

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)


def test_pickles_are_never_opened(model: Path, tmp_path: Path) -> None:
    for path in [*model.glob("*.safetensors"), model / INDEX]:
        path.unlink()
    for name in ("pytorch_model.bin", "adapter_model.bin", "model.pt"):
        (model / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(UserError, match="pickled weights"):
        open_source(str(model))
    import lqexport

    with pytest.raises(UserError):
        lqexport.load(model)
    assert not (tmp_path / "exploded").exists()


def test_code_in_the_folder_is_not_run(model: Path, tmp_path: Path) -> None:
    code = f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n"
    (model / "evil.py").write_text(code)
    change_json(model / "config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    change_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]})
    meta_model(open_source(str(model)).config)
    load_tokenizer(model)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": -1},
        {"hidden_size": "64"},
        {"hidden_size": 2**40},
        {"num_attention_heads": [2]},
        {"vocab_size": 1e9},
        {"num_local_experts": 4096, "num_hidden_layers": 1000},
        {"rope_theta": float("inf")},
        {"rope_theta": "x"},
        {"rope_parameters": [1]},
        {"rope_parameters": {"factor": [float("nan")]}},
        {"rope_parameters": {"rope_type": "linear", "factor": "two"}},
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": -1}}},
        {"architectures": "LlamaForCausalLM"},
        {"layer_types": [["x"]]},
        {"text_config": {"hidden_size": None, "head_dim": True}},
    ],
)
def test_config_json_with_what_no_model_has(config: dict[str, Any], model: Path) -> None:
    with pytest.raises(UserError, match=f"x: {next(iter(config))}|x: 1000 layers|x: head_dim"):
        check_config(config, "x")
    change_json(model / "config.json", **config)
    with pytest.raises(UserError, match=r"must be|more than any model has"):
        open_source(str(model))


@pytest.mark.parametrize("change", [{"quant_method": []}, {"quant_method": {}}, {"quant_method": "x"}])
def test_strange_quantization_of_a_source(change: dict[str, Any], sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound / "gptq", tmp_path / "gptq")
    path = tmp_path / "gptq" / "config.json"
    change_json(path, quantization_config=json.loads(path.read_text())["quantization_config"] | change)
    with pytest.raises(UserError):
        open_source(str(path.parent))


def test_missing_settings_of_rope_are_not_the_tokenizers_fault(model: Path) -> None:
    change_json(model / "config.json", rope_parameters={"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0})
    with pytest.raises(
        UserError, match=r"config\.json: rope_parameters is of the type llama3 and has no low_freq_factor"
    ):
        open_source(str(model))


def test_what_transformers_refuses_is_said(model: Path) -> None:
    change_json(model / "config.json", hidden_act="no such function")
    with pytest.raises(UserError, match="transformers can make no model"):
        meta_model(open_source(str(model)).config)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 200_000, "[]", "nul", "", "\xff", '{"a": 1' + "0" * 5000 + "}"]
)
def test_json_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="JSON"):
        read_json(tmp_path / "x.json", "missing")


def test_weights_of_another_size_than_config_json_says(model: Path) -> None:
    change_json(model / "config.json", vocab_size=321)
    with pytest.raises(UserError, match=r"embed_tokens\.weight has the shape \[320, 64\]"):
        BlockModel(open_source(str(model))).start(torch.zeros(1, 4, dtype=torch.long))


def test_a_shape_of_true_and_false(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound / "native", tmp_path / "native")
    quantization = json.loads((tmp_path / "native" / "config.json").read_text())["quantization_config"]
    next(iter(quantization["modules"].values()))["shape"] = [True, 64]
    change_json(tmp_path / "native" / "config.json", quantization_config=quantization)
    with pytest.raises(UserError, match="modules with codec and shape"):
        NativeModel(tmp_path / "native")


@pytest.mark.parametrize("side", ["A", "B"])
def test_half_of_a_correction(side: str, sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound / "peft", tmp_path / "peft")
    file, base = tmp_path / "peft" / "adapter_model.safetensors", open_export(sound / "model.gguf")
    factors = load_file(file)
    del factors[f"base_model.model.model.layers.0.mlp.up_proj.lora_{side}.weight"]
    save_file(factors, file)
    (sentence,) = misfits(base, PeftAdapter(file.parent))
    assert sentence == "The correction of model.layers.0.mlp.up_proj.weight has one of its two factors alone."


SAFETENSORS = {
    "header longer than the file": struct.pack("<Q", 10**6) + b"{}",
    "header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "tensor beyond the file": b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    "shape that overflows": b'{"x":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,0]}}',
    "offsets the wrong way": b'{"x":{"dtype":"F32","shape":[0],"data_offsets":[8,0]}}',
    "empty": b"",
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors_that_lie(name: str, tmp_path: Path) -> None:
    content = SAFETENSORS[name]
    header = content if not content.startswith(b"{") else struct.pack("<Q", len(content)) + content
    (tmp_path / "x.safetensors").write_bytes(header)
    with (
        pytest.raises(UserError, match="cut short or damaged"),
        open_tensors(tmp_path / "x.safetensors", "np", "Get it again.") as file,
    ):
        file.get_tensor("x")


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def tensor(name: str, shape: tuple[int, ...], offset: int, tensor_type: int = 0) -> bytes:
    """Returns a GGUF tensor info. Tensor type 0 is F32."""
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, tensor_type, offset)


def header(tensors: int, keys: int, *parts: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + b"".join(parts)


FULL = bytes(256)
GGUF = {
    "2^63 keys": header(0, 2**63),
    "2^63 tensors": header(2**63, 0),
    "a key of 2^60 bytes": header(0, 1, struct.pack("<Q", 2**60)),
    "an array of 2^61 numbers": header(0, 1, string("a"), struct.pack("<IIQ", 9, 10, 2**61)),
    "an array of 2^60 texts": header(0, 1, string("a"), struct.pack("<IIQ", 9, 8, 2**60)),
    "arrays in arrays": header(0, 1, string("a"), struct.pack("<IIQ", 9, 9, 1) * 50),
    "an alignment of 0": header(0, 1, string("general.alignment"), struct.pack("<II", 4, 0)),
    "an alignment that is a text": header(0, 1, string("general.alignment"), struct.pack("<I", 8), string("x")),
    "a shape that overflows": header(1, 0, tensor("a", (2**32, 2**32, 2**32), 0)),
    "no columns": header(1, 0, tensor("a", (0,), 0)),
    "nine dimensions": header(1, 0, tensor("a", (1,) * 9, 0)),
    "an offset of 2^63": header(1, 0, tensor("a", (8,), 2**63), FULL),
    "an unknown type": header(1, 0, tensor("a", (8,), 0, 99), FULL),
    "one tensor over another": header(2, 0, tensor("a", (8,), 0), tensor("b", (8,), 16), FULL),
    "the same place twice": header(2, 0, tensor("a", (8,), 0), tensor("b", (8,), 0), FULL),
    "one name twice": header(2, 0, tensor("a", (8,), 0), tensor("a", (8,), 32), FULL),
}


@pytest.mark.parametrize("name", GGUF)
def test_gguf_headers_that_lie(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(GGUF[name])
    tracemalloc.start()
    with pytest.raises(UserError, match=r"x\.gguf is truncated or damaged"):
        read_header(tmp_path / "x.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_gguf_tensors_side_by_side_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(header(2, 0, tensor("a", (8,), 32), tensor("b", (8,), 0), FULL))
    assert set(read_header(tmp_path / "x.gguf")[1]) == {"a", "b"}


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_no_gguf_no_safetensors_and_no_sentencepiece(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"GGUF" + content)
    with pytest.raises(UserError):
        read_header(path)
    path.write_bytes(content)
    for read in (read_sentencepiece, load_recipe, lambda path: read_json(path, "")):
        try:
            read(path)
        except UserError:
            continue


def test_numbers_without_an_end_are_refused(tmp_path: Path) -> None:
    """Reading a varint of a megabyte to its end would take quadratic time."""
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a" + b"\xff" * 2**20)
    with pytest.raises(UserError, match="more than 64 bits"):
        read_sentencepiece(tmp_path / "tokenizer.model")


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../../secret": "0"}},
        {"files": {"/etc/passwd": "0"}},
        {"files": [1]},
        {"tensors": {"x": 1}},
        {"tensors": [{"name": "../x", "codec": "gguf:F16", "shape": [4], "sha256": ""}]},
        {"tensors": [{"name": "x", "codec": "gguf:F17", "shape": [4], "sha256": ""}]},
        {"tensors": [{"name": "x", "codec": "gguf:F16", "shape": [-4], "sha256": ""}]},
        {"tensors": [{"name": "x", "codec": "gguf:Q4_K", "shape": [4, 3], "sha256": ""}]},
        {"tensors": [{"name": "x" * 300, "codec": "gguf:F16", "shape": [4], "sha256": ""}]},
    ],
)
def test_forged_manifests(change: dict[str, Any], sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound / "artifact-gguf", tmp_path / "artifact")
    artifact = Artifact(tmp_path / "artifact")
    path = artifact.folder / "manifest.json"
    path.write_bytes(manifest_bytes(json.loads(path.read_text()) | change))
    with pytest.raises(UserError):
        artifact.manifest() if "tensors" in change else artifact.damaged()


@pytest.mark.parametrize(
    "line", ["types = [5]", "samples = true", "bits = 'x'", "x = 1", "samples = 1" + "0" * 5000, "["]
)
def test_recipes_of_another_form(line: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(line)
    with pytest.raises(UserError, match=r"recipe\.toml"):
        load_recipe(tmp_path / "recipe.toml")


def test_sentences_hold_nothing_that_a_terminal_obeys() -> None:
    assert str(UserError("tensor \x1b[2J\x07\u202e is wrong")) == r"tensor \x1b[2J\x07\u202e is wrong"
    assert printable("naïve 日本 🙂") == "naïve 日本 🙂"
    assert len(str(UserError("\0" * 10**6))) <= LONGEST + 10
