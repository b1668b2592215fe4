"""Native folders: transformers loads them to the right values, and never loads anything wrong silently."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

import lqexport
from lqexport.converters.folders import native, shards
from lqexport.errors import UserError
from lqexport.formats.registry import codec_named, names
from lqexport.grids.fit import minmax
from lqexport.integration import loading
from lqexport.integration.packed_linear import PackedLinear
from lqexport.kernels import cuda, cuda_decode, cuda_multiply, native_decode
from lqexport.models.adapters import corrected, open_factors
from lqexport.models.blocks import BlockModel
from lqexport.models.inspect import inspect
from lqexport.models.written import open_export
from lqexport.storage.artifact import Artifact
from lqexport.verification.verifying import verify

TARGETS = [f"native:table-{bits}" for bits in (2, 3, 4)] + [f"native:affine-{bits}-g64" for bits in (2, 3, 4, 8)]
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def make(rounded_artifact: Callable[..., Artifact], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that makes the native folder of a target and a rank, once each; its artifact is beside it."""
    folders: dict[tuple[str, int], Path] = {}

    def make(target: str, rank: int = 0) -> Path:
        if (target, rank) not in folders:
            base = tmp_path_factory.mktemp("native")
            native.write(rounded_artifact(base / "artifact", target, rank), base / "folder")
            folders[target, rank] = base / "folder"
        return folders[target, rank]

    return make


@pytest.fixture(scope="module")
def words(text: Path) -> Path:
    """A text that has one window."""
    path = text.with_name("words.txt")
    path.write_text(text.read_text()[:4000])
    return path


@pytest.fixture
def copied(make: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a native folder, to be damaged."""
    shutil.copytree(make("native:table-3", 8), tmp_path / "copied")
    return tmp_path / "copied"


def ids() -> torch.Tensor:
    return torch.randint(0, 512, (1, 48), generator=torch.Generator().manual_seed(1))


def verifier_logits(folder: Path) -> torch.Tensor:
    """Returns the logits that `verify` computes."""
    export = open_export(folder)
    factors = open_factors(folder, None, export.config)
    model = BlockModel(corrected(export, factors))
    hidden = model.start(ids())
    for _, block in model.blocks():
        hidden = model.run(block, hidden)
    return model.logits(hidden)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(ids().to(model.device)).logits


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("target", TARGETS)
def test_transformers_computes_what_verify_does(target: str, rank: int, make: Callable[..., Path]) -> None:
    folder = make(target, rank)
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    linear = model.get_submodule(UP)
    assert isinstance(linear, PackedLinear)
    assert (linear.weight.dtype, linear.codec_name, linear.rank) == (torch.uint8, target, rank)
    assert torch.equal(logits(model), verifier_logits(folder))
    assert torch.equal(logits(model), verifier_logits(folder.with_name("artifact")))


@pytest.mark.parametrize("name", names("native"))
@pytest.mark.parametrize("by", [native_decode.by_torch, native_decode.by_numba])
def test_decodes_as_the_format_does(name: str, by: Callable[..., torch.Tensor]) -> None:
    """Covers numbers of columns with which the last byte of a row is not full."""
    codec = codec_named(name)
    for columns in {codec.block * 2, codec.block * 2 + (13 if codec.block == 1 else 0)}:
        weights = torch.randn(5, columns, generator=torch.Generator().manual_seed(0))
        grid = minmax(codec, weights)
        planes = codec.encode(grid.numpy(), grid.nearest(weights).numpy())
        decoded = by(name, {plane: torch.from_numpy(array) for plane, array in planes.items()}, columns)
        assert torch.equal(decoded.view(torch.int32), torch.from_numpy(codec.decode(planes, columns)).view(torch.int32))


def test_nothing_else_is_decoded() -> None:
    with pytest.raises(ValueError, match="not gguf:Q4_K"):
        native_decode.decode("gguf:Q4_K", {}, 256)


def test_generates_saves_and_loads_again(
    make: Callable[..., Path], tmp_path: Path, tiny_model: Path, words: Path
) -> None:
    folder = make("native:table-3", 8)
    model = lqexport.load(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("def f(x):", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert written.shape == (1, prompt["input_ids"].shape[1] + 4)
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    before, after = (load_file(directory / "model.safetensors") for directory in (folder, tmp_path / "again"))
    packed = [name for name in before if name.startswith(UP)]
    assert len(packed) == 4
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in packed)
    assert torch.equal(logits(lqexport.load(tmp_path / "again", dtype=torch.float32)), logits(model))
    result = verify(tmp_path / "again", str(tiny_model), text=str(words), windows=1)
    assert (result.failed, result.tensors[0].same_bytes) == ([], None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_planes_survive_other_dtypes(dtype: torch.dtype, make: Callable[..., Path]) -> None:
    folder = make("native:affine-3-g64", 8)
    exact = lqexport.load(folder, dtype=torch.float32)
    model = lqexport.load(folder, dtype=torch.float32).to(dtype)
    assert (logits(model).dtype, model.get_submodule(UP).scale.dtype) == (dtype, torch.float16)
    assert torch.equal(model.get_submodule(UP).decoded(), exact.get_submodule(UP).decoded())
    assert torch.nn.functional.cosine_similarity(logits(model).float(), logits(exact), dim=-1).min() > 0.99
    direct = lqexport.load(folder, dtype=dtype).get_submodule(UP)
    assert torch.equal(direct.decoded(), exact.get_submodule(UP).decoded())


def test_device_map_and_a_model_without_its_head(make: Callable[..., Path]) -> None:
    folder = make("native:table-4")
    model = lqexport.load(folder, dtype=torch.float32, device_map="auto")
    assert torch.equal(logits(model), verifier_logits(folder).to(model.device))
    bare = AutoModel.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        hidden = bare(ids().to(bare.device)).last_hidden_state
    assert torch.allclose(hidden @ bare.embed_tokens.weight.T, verifier_logits(folder).to(hidden.device), atol=1e-4)


def test_weights_that_are_offloaded_to_the_disk(make: Callable[..., Path], tmp_path: Path) -> None:
    folder = make("native:table-4", 8)
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    device_map |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = lqexport.load(folder, dtype=torch.float32, device_map=device_map, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(model), verifier_logits(folder))


def test_dequantizes(make: Callable[..., Path]) -> None:
    folder = make("native:affine-2-g64", 8)
    model = lqexport.load(folder, dtype=torch.float32).dequantize()
    assert type(model.get_submodule(UP)) is torch.nn.Linear
    assert torch.equal(logits(model), verifier_logits(folder))


def test_adapters_train_on_top(make: Callable[..., Path], tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    folder = make("native:table-3", 8)
    base = lqexport.load(folder, dtype=torch.float32)
    planes = {name: plane.clone() for name, plane in base.get_submodule(UP).planes().items()}
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], 1e-2)
    losses = []
    for _ in range(4):
        loss = model(ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    packed = model.get_base_model().get_submodule(UP).base_layer
    assert all(torch.equal(plane, planes[name]) for name, plane in packed.planes().items())
    model.save_pretrained(tmp_path)
    model.eval()
    again = PeftModel.from_pretrained(lqexport.load(folder, dtype=torch.float32), tmp_path)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(RuntimeError):  # packed codes cannot hold the sum of weight and adapter
        model.merge_and_unload()


def test_gradients_are_those_of_the_decoded_weights(make: Callable[..., Path]) -> None:
    linear = lqexport.load(make("native:table-3", 8), dtype=torch.float32).get_submodule(UP)
    x = torch.randn(2, 3, 256, requires_grad=True)
    (packed,) = torch.autograd.grad(linear(x).square().sum(), x)
    (plain,) = torch.autograd.grad((x @ linear.decoded().T).square().sum(), x)
    assert torch.allclose(packed, plain, rtol=1e-5, atol=1e-5)


def test_a_bias_and_the_kernels_path(kernels_on: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA kernel runs on the CPU."""
    reader = cuda_decode.READERS["native:affine-4-g64"].type
    product = f"multiply<{reader}, float, 1>"
    kernels_on("plain", {cuda_multiply.SOURCE: [product]})
    linear = PackedLinear("native:affine-4-g64", 6, 256, rank=4, bias=True)
    weights = torch.randn(6, 256)
    codec = codec_named(linear.codec_name)
    grid = minmax(codec, weights)
    for plane, array in codec.encode(grid.numpy(), grid.nearest(weights).numpy()).items():
        linear.planes()[plane].copy_(torch.from_numpy(array))
    linear.bias.data.normal_()
    linear.low_rank_A.normal_()
    linear.low_rank_B.normal_()
    x = torch.randn(1, 1, 256)
    expected = linear(x)
    monkeypatch.setattr(cuda, "usable", lambda _: True)
    assert torch.allclose(linear(x), expected, rtol=1e-4, atol=1e-4)


# Nothing loads wrong silently.


@pytest.mark.parametrize("target", ["native:table-3", "native:affine-8-g64"])
def test_without_lqexport_loading_fails(
    target: str, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without lqexport, transformers raises an error instead of taking random weights.

    It does so for 8-bit codes too, though there are as many codes as weights.
    """
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "lqexport")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(make(target))


def test_importing_is_quick_and_registers(tmp_path: Path) -> None:
    script = (
        "import lqexport, sys\n"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as quantizers\n"
        "print(quantizers['lqexport'].__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "LqexportQuantizer\n", done.stderr


@pytest.mark.parametrize("lost", [f"{UP}.weight", f"{UP}.table", f"{UP}.low_rank_B", "model.norm.weight"])
def test_a_missing_tensor_is_an_error(lost: str, copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    del tensors[lost]
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="cannot be loaded"):
        lqexport.load(copied)


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def test_a_newer_version_is_refused(copied: Path, tiny_model: Path, words: Path) -> None:
    edit(copied, version=2)
    with pytest.raises(UserError, match="version 2"):
        lqexport.load(copied)
    with pytest.raises(UserError, match="version 2"):
        verify(copied, str(tiny_model), text=str(words))


@pytest.mark.parametrize(
    "module",
    [
        {"codec": "native:table-9", "shape": [512, 256]},
        {"codec": "native:table-3", "shape": [512]},
        {"codec": "native:table-3", "shape": [512, 256], "rank": -1},
        {"codec": "native:table-3", "shape": [0, 256]},
        None,
    ],
)
def test_a_config_that_makes_no_sense_is_refused(module: Any, copied: Path) -> None:
    edit(copied, modules={UP: module})
    with pytest.raises(UserError, match="should list modules"):
        open_export(copied)


@pytest.mark.parametrize("missing", [True, False])
def test_files_and_config_must_agree(missing: bool, copied: Path) -> None:
    modules = json.loads((copied / "config.json").read_text())["quantization_config"]["modules"]
    if missing:
        modules["model.layers.0.self_attn.extra"] = modules[UP]
    else:
        del modules[UP]
    edit(copied, modules=modules)
    with pytest.raises(UserError, match="has no tensor" if missing else "does not explain"):
        open_export(copied)


def test_a_wrong_number_of_rows_is_refused(copied: Path) -> None:
    modules = json.loads((copied / "config.json").read_text())["quantization_config"]["modules"]
    modules[UP]["shape"] = [511, 256]
    edit(copied, modules=modules)
    with pytest.raises(UserError, match="codes of 511 rows"):
        open_export(copied).read(f"{UP}.weight")


# Verification, inspection, writing.


def test_verify_knows_every_tensor(make: Callable[..., Path], tiny_model: Path, words: Path) -> None:
    folder = make("native:table-4", 8)
    result = verify(folder, str(tiny_model), text=str(words), windows=1)
    assert result.failed == []
    assert all(tensor.same_bytes for tensor in result.tensors)
    of_artifact = verify(folder.with_name("artifact"), str(tiny_model), text=str(words), windows=1)
    assert result.evaluations == of_artifact.evaluations
    assert result.bits_per_weight == of_artifact.bits_per_weight
    assert result.run == {"recipe": {"target": "native:table-4"}}


def test_one_changed_byte_is_found(copied: Path, tiny_model: Path, words: Path) -> None:
    path = copied / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    result = verify(copied, str(tiny_model), text=str(words), windows=1)
    assert len(result.failed) == 1
    assert "1 tensors are not those of" in result.failed[0]


def test_inspect_counts_the_same_bytes(make: Callable[..., Path]) -> None:
    folder = make("native:table-3", 8)
    of_folder, of_artifact = inspect(folder), inspect(folder.with_name("artifact"))
    assert of_folder.container == "native folder"
    assert sorted(of_folder.entries, key=str) == sorted(of_artifact.entries, key=str)


def test_shards_have_an_index(make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make("native:table-3", 8)
    monkeypatch.setattr(shards, "SHARD_BYTES", 200_000)
    native.write(Artifact(whole.with_name("artifact")), tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("model-0*.safetensors"))) > 2
    sharded, one = (lqexport.load(folder, dtype=torch.float32) for folder in (tmp_path / "shards", whole))
    assert torch.equal(logits(sharded), logits(one))
    assert torch.equal(verifier_logits(tmp_path / "shards"), logits(one))


def test_equal_artifacts_give_equal_files(make: Callable[..., Path], tmp_path: Path) -> None:
    whole = make("native:table-3", 8)
    native.write(Artifact(whole.with_name("artifact")), tmp_path / "again")
    files = {path.relative_to(whole) for path in whole.rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file()}
    assert all((whole / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)


def test_writing_refuses_what_it_cannot_do(
    make: Callable[..., Path], rounded_artifact: Callable[..., Artifact], tmp_path: Path
) -> None:
    folder = make("native:table-3", 8)
    with pytest.raises(UserError, match="exists"):
        native.write(Artifact(folder.with_name("artifact")), folder)
    with pytest.raises(UserError, match="No linear of the artifact is in a native codec"):
        native.write(rounded_artifact(tmp_path / "f16", "gguf:F16"), tmp_path / "out")
    shutil.copytree(folder.with_name("artifact"), tmp_path / "damaged")
    path = tmp_path / "damaged" / "tensors" / f"{UP}.weight.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not the one that its manifest lists"):
        native.write(Artifact(tmp_path / "damaged"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "f16"]


# Loaders.


def test_the_loader_of_the_original_by_name_and_shape(make: Callable[..., Path], tiny_model: Path) -> None:
    folder = make("native:table-3", 8)
    loader = lqexport.LeanQuantModelForCausalLM
    model = loader.from_pretrained(tiny_model, folder, bits=3, device_map="cpu", dtype=torch.float32)
    assert torch.equal(logits(model), verifier_logits(folder))
    with pytest.raises(UserError, match="packed in 3 bits, not 4"):
        loader.from_pretrained(tiny_model, folder, bits=4)


def test_another_base_is_refused(make: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match=r"is a llama model, and .* a gpt2 one"):
        loading.LeanQuantModelForCausalLM.from_pretrained(tmp_path, make("native:table-3", 8))


def test_other_folders_are_no_native_ones(tiny_model: Path) -> None:
    with pytest.raises(UserError, match="not of the native format"):
        lqexport.load(tiny_model)
    with pytest.raises(UserError, match="cannot be loaded: there is no such folder, and as a name on the hub"):
        lqexport.load("/no/such/folder")
    with pytest.raises(UserError, match="is a file, and no folder of the native format"):
        lqexport.load(tiny_model / "config.json")
