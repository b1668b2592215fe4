"""How often files of many tensors are opened: parsing a header takes as long as it has tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lqexport.converters.folders.stored_tensors import StoredTensors
from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.tensor_names import gguf_names
from lqexport.errors import UserError
from lqexport.models.inspect import inspect
from lqexport.models.source import HuggingFaceSource
from lqexport.storage import tensor_files

LAYERS = 111
SMALL_DTYPES = [getattr(torch, name) for name in tensor_files.DTYPES.values()]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 1001 tensors in two shards."""
    folder = tmp_path_factory.mktemp("many")
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5}
    config |= {"hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": LAYERS, "vocab_size": 2}
    config |= {"num_attention_heads": 1, "num_key_value_heads": 1, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    names = [name for name in gguf_names(LLAMA, LAYERS) if name.endswith(".weight") and name != "lm_head.weight"]
    weight_map = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(names)}
    for shard in sorted(set(weight_map.values())):
        own = [name for name in names if weight_map[name] == shard]
        shapes = {name: (2,) if "norm" in name else (2, 2) for name in own}
        save_file({name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_a_listing_opens_each_shard_a_few_times(shards: Path, opened: list[Path]) -> None:
    entries = inspect(shards).entries
    assert len(entries) > 1000
    assert {(entry.type, entry.shape, entry.nbytes) for entry in entries} == {("BF16", (2,), 4), ("BF16", (2, 2), 8)}
    assert len(opened) <= 3 * 2


def test_shapes_of_a_written_folder_open_each_file_once(shards: Path, opened: list[Path]) -> None:
    (shards / "._model.safetensors").touch()  # macOS leaves such files on other disks
    stored = StoredTensors(shards, "np")
    assert {stored.shape(name) for name in stored} == {(2,), (2, 2)}
    assert len(stored) > 1000
    assert len(opened) == 2
    with pytest.raises(UserError, match="has no tensor nothing"):
        stored.shape("nothing")


@pytest.mark.parametrize("framework", ["np", "pt"])
def test_forms_are_those_of_every_dtype(framework: Any, tmp_path: Path) -> None:
    dtypes = (torch.bfloat16, torch.float8_e4m3fn, torch.float16, torch.int32, torch.uint8)
    path = tmp_path / "all.safetensors"
    save_file({str(dtype): torch.zeros(3, 2).to(dtype) for dtype in dtypes} | {"scalar": torch.tensor(1.0)}, path)
    with tensor_files.open_tensors(path, framework, "") as file:
        found = tensor_files.forms(file)
    assert found.pop("scalar") == ("F32", ())
    assert [found[str(dtype)] for dtype in dtypes] == [
        (name, (3, 2)) for name in ("BF16", "F8_E4M3", "F16", "I32", "U8")
    ]


def test_small_tensors_are_read_without_parsing_the_header_each_time(shards: Path, opened: list[Path]) -> None:
    source = HuggingFaceSource(shards, "many")
    opened.clear()
    tensors = [source.read(name) for name in source.names()]
    assert len(tensors) > 1000
    assert {(tuple(tensor.shape), tensor.dtype) for tensor in tensors} == {
        ((2,), torch.bfloat16),
        ((2, 2), torch.bfloat16),
    }
    assert len(opened) <= 2


@pytest.mark.parametrize("dtype", [*SMALL_DTYPES, torch.float8_e4m3fn])
def test_small_tensors_are_those_of_safetensors(dtype: torch.dtype, tmp_path: Path) -> None:
    path, expected = tmp_path / "x.safetensors", torch.arange(6).reshape(2, 3).to(dtype)
    save_file({"a": torch.ones(3), "x": expected}, path)
    with tensor_files.open_tensors(path, "pt", "") as file:
        form = tensor_files.forms(file)["x"]
    small = tensor_files.small_tensor(path, tensor_files.spans(path)["x"], *form)
    if dtype not in SMALL_DTYPES:
        assert small is None
        return
    assert small is not None
    assert small.dtype == dtype
    assert torch.equal(small, expected)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"x\.safetensors is cut short"):
        tensor_files.small_tensor(path, (path.stat().st_size - 5, 24), *form)
