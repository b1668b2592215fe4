"""Apertus: four numbers in each block, which are tensors in checkpoints and arrays of the metadata in GGUF files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from family_cases import export, make_model, make_tokenizer
from rewritten_files import Content, rewritten

import lqexport
from lqexport.checking.checking import check_file
from lqexport.converters.gguf.reader import GGUFModel
from lqexport.errors import UserError
from lqexport.models.written import open_export
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe

NAMES = ("alpha_p", "alpha_n", "beta", "eps")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model in `hf` and its file `F16.gguf`."""
    folder = tmp_path_factory.mktemp("apertus")
    make_model("apertus").save_pretrained(folder / "hf")
    make_tokenizer("gpt-2", folder).save_pretrained(folder / "hf")
    export(folder, Recipe(str(folder / "hf"), "gguf:F16"))
    return folder


def test_gguf_files_have_the_numbers_as_arrays(folder: Path) -> None:
    file, stored = GGUFModel(folder / "F16.gguf"), safetensors.torch.load_file(folder / "hf/model.safetensors")
    for name in NAMES:
        tensors = [stored[f"model.layers.{block}.mlp.act_fn.{name}"] for block in range(2)]
        assert np.array_equal(file.metadata[f"xielu.{name}"], [float(tensor) for tensor in tensors])
        read = file.read(f"model.layers.1.mlp.act_fn.{name}")
        assert read.shape == (1,)
        assert read.item() == tensors[1].item()


@pytest.mark.parametrize("values", [None, [0.5]])
def test_a_file_that_lacks_a_number_lacks_a_tensor(folder: Path, tmp_path: Path, values: list[float] | None) -> None:
    def spoil(content: Content) -> None:
        del content.values["xielu.beta"]
        content.values |= {"xielu.beta": values} if values else {}

    path = rewritten(folder / "F16.gguf", tmp_path / "model.gguf", spoil)
    with pytest.raises(UserError, match=r"has no tensor .*blk\.1\.xielu\.beta"):
        GGUFModel(path)
    assert any("blk.1.xielu.beta" in str(problem) for problem in check_file(path, engine=False).problems)


def test_folders_hold_numbers_as_transformers_does(folder: Path, tmp_path: Path) -> None:
    quantize(Recipe(str(folder / "hf"), "native:affine-8-g32", method="rtn"), tmp_path / "artifact")
    written = lqexport.export(tmp_path / "artifact", tmp_path / "folder")
    stored = safetensors.torch.load_file(written / "model.safetensors")
    for name, shape in (("alpha_p", (1,)), ("beta", ()), ("eps", ())):
        tensor = f"model.layers.0.mlp.act_fn.{name}"
        assert stored[tensor].shape == shape
        assert torch.equal(open_export(written).read(tensor), stored[tensor].reshape(1))
